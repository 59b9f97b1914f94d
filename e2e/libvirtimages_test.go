// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"net"
	"os"
	"regexp"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/lab"
)

// holdsLease says whether a virtlockd has locked a file.
func holdsLease(t *testing.T, locker *lab.Process, path string) bool {
	t.Helper()
	locks, err := os.ReadFile("/proc/locks")
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	held := fmt.Sprintf(`(?m)^\d+: POSIX +ADVISORY +WRITE %d \S+:%d `, locker.PID, st.Ino)
	return regexp.MustCompile(held).Match(locks)
}

// TestLibvirtImages moves a domain there and back whose images, one of them in a storage pool, virtlockd locks, on the
// host where the domain runs and on no other. The storage is like NFS: libvirt cannot
// record on it that the image is still in use, and changes the owner of the image when a domain ends. The domain that
// continues keeps the image all the same, also after a cancelled migration. While its memory is arriving, virsh cannot
// resume it at the source.
func TestLibvirtImages(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	lockers := map[*lab.Host]*lab.Process{}
	for _, h := range l.Hosts() {
		locker, err := h.Start(os.Stderr, "virtlockd")
		if err != nil {
			t.Fatal(err)
		}
		lockers[h] = locker
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
	for _, h := range l.Hosts() {
		virsh(t, h, "pool-create-as", "shared", "dir", "--target", lab.SharedDir)
	}
	virsh(t, l.A, "vol-create-as", "shared", "volume.img", "1M", "--format", "raw")
	if err := l.A.VirshXML(testContext(t), `<disk type='volume' device='disk'>`+
		`<driver name='qemu' type='raw' cache='none'/><source pool='shared' volume='volume.img'/>`+
		`<target dev='vdz' bus='virtio'/></disk>`,
		"attach-device", "--live", lab.DomainName); err != nil {
		t.Fatal(err)
	}
	virsh(t, l.B, "pool-refresh", "shared")
	checkLeases := func(when string, runs *lab.Host) {
		t.Helper()
		for _, h := range l.Hosts() {
			for _, image := range []string{"guest-disk0.qcow2", "volume.img"} {
				if got := holdsLease(t, lockers[h], l.Shared(lab.SharedDir+"/"+image)); got != (h == runs) {
					t.Errorf("%s: host %s has the lease of %s: %v", when, h.Name, image, got)
				}
			}
		}
	}
	checkLeases("before the first migration", l.A)
	owner := func() uint32 {
		var st [2]unix.Stat_t
		for i, image := range []string{"guest-disk0.qcow2", "volume.img"} {
			if err := unix.Stat(l.Shared(lab.SharedDir+"/"+image), &st[i]); err != nil {
				t.Fatal(err)
			}
		}
		if st[0].Uid != st[1].Uid {
			t.Errorf("the image is user %d's, and the volume user %d's", st[0].Uid, st[1].Uid)
		}
		return st[0].Uid
	}
	wanted := owner()
	if wanted == 0 {
		t.Fatal("libvirt has not given the image to QEMU's user")
	}
	checkCancelled(t, l)
	if got := owner(); got != wanted {
		t.Errorf("after a migration that was cancelled the image is user %d's, not %d's", got, wanted)
	}
	checkLeases("after a migration that was cancelled", l.A)
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
		checkLeases(id, to)
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
