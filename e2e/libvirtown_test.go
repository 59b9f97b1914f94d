// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"testing"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/lab"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// TestLibvirtsOwnMigration moves a domain by libvirt's own live migration, by ours, and by libvirt's again. No other
// test runs in parallel: an emulated guest with little processor time may hang after libvirt's migration.
func TestLibvirtsOwnMigration(t *testing.T) {
	l := newLab(t)
	startLibvirt(t, l)
	var guest report.Log
	port := runDomain(t, l.A, domainVM(t), true, &guest)
	from, to := l.A, l.B
	for hop, way := range []string{"libvirt", "migrated", "libvirt"} {
		if err := port.Close(); err != nil {
			t.Fatal(err)
		}
		switch way {
		case "migrated":
			completed(t, migrateSpec(t, from, fmt.Sprintf("hop-%d", hop), &migratedv1.MigrationSpec{
				Vm: lab.DomainVM, Destination: to.DaemonAddr(), Persistent: true, UndefineSource: true,
			}))
		case "libvirt":
			// Unsafe: libvirt does not know that the hosts share the image.
			virsh(t, from, "migrate", "--live", "--unsafe", "--p2p", "--persistent", "--undefinesource",
				lab.DomainName, to.LibvirtURI())
		}
		port = checkGuestAt(t, to, &guest)
		from, to = to, from
	}
	if err := port.Close(); err != nil {
		t.Error(err)
	}
}
