// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/lab"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// TestLibvirtOwner: on storage where libvirt can't write down that an image is still in use, as on NFS, it gives the
// image away when a domain ends. The domain that goes on keeps it all the same.
func TestLibvirtOwner(t *testing.T) {
	l := newLab(t)
	startLibvirt(t, l, "remember_owner = 0")
	var guest report.Log
	port := runDomain(t, l.A, domainVM(t), false, &guest)
	if err := port.Close(); err != nil {
		t.Fatal(err)
	}
	owner := func() uint32 {
		var st unix.Stat_t
		if err := unix.Stat(l.Shared(lab.SharedDir+"/guest-disk0.qcow2"), &st); err != nil {
			t.Fatal(err)
		}
		return st.Uid
	}
	wanted := owner()
	if wanted == 0 {
		t.Fatal("libvirt has not given the image to QEMU's user")
	}
	cancelled(t, l)
	if got := owner(); got != wanted {
		t.Errorf("after a migration that was cancelled the image is user %d's, not %d's", got, wanted)
	}
	from, to := l.A, l.B
	for _, hop := range []string{"there", "back"} {
		m := migrateSpec(t, from, hop, &migratedv1.MigrationSpec{Vm: lab.DomainVM, Destination: to.DaemonAddr()})
		if m.GetState() != migratedv1.MigrationState_MIGRATION_STATE_COMPLETED {
			t.Fatalf("migration is %v: %v", m.GetState(), m.GetError())
		}
		if got := owner(); got != wanted {
			t.Errorf("%s: the image is user %d's, not %d's", hop, got, wanted)
		}
		port = openGuest(t, to, &guest)
		awaitBlocks(t, &guest, writesOf(guest.Disks())+50)
		verifyLinux(t, &guest, port)
		if err := port.Close(); err != nil {
			t.Fatal(err)
		}
		from, to = to, from
	}
	virsh(t, from, "destroy", lab.DomainName)
	if got := owner(); got == wanted {
		t.Errorf("when the last domain has ended, the image is still user %d's", got)
	}
}
