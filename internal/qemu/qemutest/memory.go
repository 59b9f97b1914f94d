// SPDX-License-Identifier: Apache-2.0

package qemutest

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/ram"
	"github.com/migrated-vm/migrated/pkg/testenv"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

// CheckBlock writes to the block's file and reads the same bytes at the block's address in QEMU.
func CheckBlock(t *testing.T, vm *qemu.VM, b ram.Block) {
	t.Helper()
	file, err := os.OpenFile(b.Path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	mapped, err := unix.Mmap(int(file.Fd()), b.FileOffset, int(b.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Munmap(mapped); err != nil {
			t.Error(err)
		}
	}()
	memory, err := os.Open(fmt.Sprintf("/proc/%d/mem", vm.Pid))
	if err != nil {
		testenv.CannotRun(t, "%v", err)
	}
	defer memory.Close()
	for _, offset := range []uint64{b.Size / 2, b.Size - b.PageSize} {
		mark := []byte(fmt.Sprintf("mark of %s at %d", b.ID, offset))
		copy(mapped[offset:], mark)
		got := make([]byte, len(mark))
		if _, err := memory.ReadAt(got, int64(b.Addr+offset)); err != nil || !bytes.Equal(got, mark) {
			t.Errorf("block %+v at offset %d: %q, %v", b, offset, got, err)
		}
	}
}

// HugePages reserves count pages of 2 MiB for the test and returns a directory with hugetlbfs mounted on it.
func HugePages(t *testing.T, count int) (dir string) {
	t.Helper()
	NeedRoot(t)
	uffdtest.ReserveHugePages(t, count)
	dir = t.TempDir()
	if err := unix.Mount("hugetlbfs", dir, "hugetlbfs", 0, "pagesize=2M,mode=1777"); err != nil {
		testenv.CannotRun(t, "%v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// RAMFile returns a path for guest RAM on tmpfs.
func RAMFile(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "migrated-test-")
	if err != nil {
		testenv.CannotRun(t, "%v", err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "ram")
}

// RAM returns the arguments that give a machine 64 MiB of RAM in a file, or in a directory.
func RAM(path string) []string {
	return []string{"-m", "64",
		"-object", "memory-backend-file,id=ram0,size=64M,share=on,mem-path=" + path, "-machine", "memory-backend=ram0"}
}
