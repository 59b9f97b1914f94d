// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/lab"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// TestLibvirtsOwnMigration moves a domain by libvirt's own live migration, by ours, and by libvirt's again. No other
// test runs in parallel: an emulated guest with little processor time may hang after libvirt's migration. One that
// hangs all the same is reset.
func TestLibvirtsOwnMigration(t *testing.T) {
	l := newLab(t)
	startLibvirt(t, l)
	guest := new(report.Log)
	port := runDomain(t, l.A, domainVM(t), true, guest)
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
			if !speaks(t, to, guest) {
				t.Logf("KNOWN: after QEMU's own migration (hop %d) the emulated guest hangs, and is reset", hop)
				virsh(t, to, "reset", lab.DomainName)
				guest = new(report.Log)
			}
		}
		port = checkGuestAt(t, to, guest)
		from, to = to, from
	}
	if err := port.Close(); err != nil {
		t.Error(err)
	}
}

// speaks reports whether a guest says anything on a host within a minute.
func speaks(t *testing.T, h *lab.Host, guest *report.Log) bool {
	t.Helper()
	port := openGuest(t, h, guest)
	ctx, cancel := context.WithTimeout(testContext(t), time.Minute)
	defer cancel()
	_, _, err := guest.Wait(ctx, guest.Len(), func(report.Line) bool { return true })
	if err := port.Close(); err != nil {
		t.Fatal(err)
	}
	return err == nil
}
