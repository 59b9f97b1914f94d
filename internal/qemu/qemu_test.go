// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/cannot"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

// testContext ends a test that hangs.
func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func qemuBinary(t *testing.T) string {
	t.Helper()
	path, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		cannot.Run(t, "%v", err)
	}
	return path
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		cannot.Run(t, "needs root")
	}
}

// ramFile returns a path for guest RAM on tmpfs.
func ramFile(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "migrated-test-")
	if err != nil {
		cannot.Run(t, "%v", err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "ram")
}

// ram are the arguments that give a machine 64 MiB in a file or directory.
func ram(path string) []string {
	return []string{"-m", "64",
		"-object", "memory-backend-file,id=ram0,size=64M,share=on,mem-path=" + path, "-machine", "memory-backend=ram0"}
}

// start starts a q35 machine that is killed at the end of the test.
func start(t *testing.T, args ...string) (*Process, *VM) {
	t.Helper()
	return startAs(t, Credentials{UID: uint32(os.Geteuid()), GID: uint32(os.Getegid())}, args...)
}

func startAs(t *testing.T, c Credentials, args ...string) (*Process, *VM) {
	t.Helper()
	return startWith(t, nil, startOptions(t, c, args...))
}

func startWith(t *testing.T, s *Starter, opts StartOptions) (*Process, *VM) {
	t.Helper()
	p, vm, err := s.Start(testContext(t), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Kill(context.Background()); err != nil {
			t.Error(err)
		}
		if err := vm.Close(); err != nil {
			t.Error(err)
		}
	})
	return p, vm
}

func startOptions(t *testing.T, c Credentials, args ...string) StartOptions {
	t.Helper()
	dir, err := os.MkdirTemp("", "migrated-test-") // t.TempDir is closed to other users
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	qmpPath := filepath.Join(dir, "qmp")
	argv := append([]string{qemuBinary(t), "-M", "q35", "-accel", "tcg", "-nodefaults", "-display", "none",
		"-qmp", "unix:" + qmpPath + ",server=on,wait=off"}, args...)
	return StartOptions{Args: argv, Credentials: c, Dir: dir, QMPPath: qmpPath, PipePath: filepath.Join(dir, "pipe"), LogPath: filepath.Join(dir, "log")}
}

// socketPair returns two connected sockets, as files.
func socketPair(t testing.TB) (a, b *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(fds[1], true); err != nil {
		t.Fatal(err)
	}
	a, b = os.NewFile(uintptr(fds[0]), "a"), os.NewFile(uintptr(fds[1]), "b")
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

// hugePages mounts hugetlbfs and reserves pages of 2 MiB for the test.
func hugePages(t *testing.T, count int) (dir string) {
	t.Helper()
	needRoot(t)
	uffdtest.ReserveHugePages(t, count)
	dir = t.TempDir()
	if err := unix.Mount("hugetlbfs", dir, "hugetlbfs", 0, "pagesize=2M,mode=1777"); err != nil {
		cannot.Run(t, "%v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// awaitFile returns when path exists or ctx ends.
func awaitFile(ctx context.Context, path string) {
	for ctx.Err() == nil {
		if _, err := os.Stat(path); err == nil {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// A balloon, or the like, is seen in a QEMU that waits for a migration, too: that is when it
// is asked for.
func TestDiscardsAreSeen(t *testing.T) {
	for _, c := range []struct {
		name string
		args []string
		want bool
	}{
		{"none", nil, false},
		{"balloon", []string{"-device", "virtio-balloon-pci"}, true},
		{"balloon to come", []string{"-device", "virtio-balloon-pci", "-S", "-incoming", "defer"}, true},
		{"virtio-mem to come", []string{"-m", "32M,maxmem=1G", "-object", "memory-backend-ram,id=m,size=128M", "-device", "virtio-mem-pci,memdev=m", "-S", "-incoming", "defer"}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, vm := start(t, c.args...)
			if got, err := vm.discards(testContext(t)); err != nil || got != c.want {
				t.Errorf("gives memory back: %v, %v", got, err)
			}
		})
	}
}
