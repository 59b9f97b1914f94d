// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/lab"
)

// TestLibvirtImages moves a domain there and back whose image virtlockd locks. The storage is like NFS: libvirt cannot
// record on it that the image is still in use, and changes the owner of the image when a domain ends. The domain that
// continues keeps the image all the same, also after a cancelled migration. While its memory is arriving, virsh cannot
// resume it at the source.
func TestLibvirtImages(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	for _, h := range l.Hosts() {
		if _, err := h.Start(os.Stderr, "virtlockd"); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() error {
			conn, err := net.Dial("unix", h.Path("/run/libvirt/virtlockd-sock"))
			if err == nil {
				err = conn.Close()
			}
			return err
		})
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
	checkCancelled(t, l)
	if got := owner(); got != wanted {
		t.Errorf("after a migration that was cancelled the image is user %d's, not %d's", got, wanted)
	}
	from, to := l.A, l.B
	for _, id := range []string{"there", "back"} {
		if err := port.Close(); err != nil {
			t.Fatal(err)
		}
		client, m := moveDomainSlowly(t, from, to, id, false)
		out, err := from.Virsh(testContext(t), "resume", lab.DomainName)
		t.Logf("%v; virsh resume at the source: %v, %v", m.GetState(), out, err)
		if err == nil {
			t.Errorf("the VM was resumed at the source: %q", out)
		}
		awaitDomain(t, from, "paused")
		awaitDomain(t, to, "running")
		finishMove(t, client, id)
		awaitDomain(t, from, "")
		if got := owner(); got != wanted {
			t.Errorf("%s: the image is user %d's, not %d's", id, got, wanted)
		}
		port = checkGuestAt(t, to, &guest)
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
