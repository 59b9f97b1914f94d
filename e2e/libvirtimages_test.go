// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/lab"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// TestLibvirtImages moves a domain there and back whose image virtlockd locks, on storage where libvirt can't write down
// that it is still in use, as on NFS: there libvirt gives the image away when a domain ends. The domain that goes on
// keeps it all the same, also after a migration that was cancelled. While its memory crosses, whoever resumes it at the
// source is refused.
func TestLibvirtImages(t *testing.T) {
	l := newLab(t)
	for _, h := range []*lab.Host{l.A, l.B} {
		if _, err := h.Start(os.Stderr, "virtlockd"); err != nil {
			t.Fatal(err)
		}
	}
	startLibvirt(t, l, `lock_manager = "lockd"`, "remember_owner = 0")
	var guest report.Log
	port := runDomain(t, l.A, domainVM(t), false, &guest)
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
	for _, id := range []string{"there", "back"} {
		if err := port.Close(); err != nil {
			t.Fatal(err)
		}
		client := control(t, from)
		spec := &migratedv1.MigrationSpec{Vm: lab.DomainVM, Destination: to.DaemonAddr(), Bandwidth: 1 << 20}
		if _, err := client.Start(testContext(t), &migratedv1.StartRequest{Id: id, Spec: spec}); err != nil {
			t.Fatal(err)
		}
		m := await(t, client, id, func(m *migratedv1.Migration) bool {
			return m.GetLocation() == migratedv1.Location_LOCATION_DESTINATION
		})
		out, err := from.Virsh(testContext(t), "resume", lab.DomainName)
		t.Logf("%v; virsh resume at the source: %v, %v", m.GetState(), out, err)
		if err == nil {
			t.Errorf("the VM was resumed at the source: %q", out)
		}
		awaitDomain(t, from, "paused")
		awaitDomain(t, to, "running")
		if _, err := client.SetBandwidth(testContext(t), &migratedv1.SetBandwidthRequest{Id: id}); err != nil {
			t.Fatal(err)
		}
		m = await(t, client, id, func(*migratedv1.Migration) bool { return false })
		if m.GetState() != migratedv1.MigrationState_MIGRATION_STATE_COMPLETED {
			t.Fatalf("it is %v: %v", m.GetState(), m.GetError())
		}
		awaitDomain(t, from, "")
		if got := owner(); got != wanted {
			t.Errorf("%s: the image is user %d's, not %d's", id, got, wanted)
		}
		port = openGuest(t, to, &guest)
		awaitBlocks(t, &guest, writesOf(guest.Disks())+50)
		verifyLinux(t, &guest, port)
		from, to = to, from
	}
	if err := port.Close(); err != nil {
		t.Error(err)
	}
	virsh(t, from, "destroy", lab.DomainName)
	if got := owner(); got == wanted {
		t.Errorf("when the last domain has ended, the image is still user %d's", got)
	}
}
