// SPDX-License-Identifier: Apache-2.0

package ram

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/qemu/hugepages"
	"github.com/migrated-vm/migrated/internal/qemu/process"
	"github.com/migrated-vm/migrated/pkg/testenv"
	"github.com/migrated-vm/migrated/pkg/uffd"
)

// onKernel makes the code believe for this test that the kernel fills missing pages with zeros, or does not.
func onKernel(t *testing.T, fills bool) {
	t.Helper()
	collapseFillsMissing = func() (bool, error) { return fills, nil }
	t.Cleanup(func() { collapseFillsMissing = uffd.CollapseFillsMissing })
}

// tmpfsWith mounts a tmpfs with the given huge= option.
func tmpfsWith(t *testing.T, huge string) (dir string) {
	t.Helper()
	if os.Geteuid() != 0 {
		testenv.CannotRun(t, "needs root")
	}
	dir = t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "huge="+huge); err != nil {
		testenv.CannotRun(t, "tmpfs with huge=%s: %v", huge, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// mapped maps one page of a file and returns it as a block of RAM.
func mapped(t *testing.T, f *os.File) Block {
	t.Helper()
	size := os.Getpagesize()
	if err := f.Truncate(int64(size)); err != nil {
		t.Fatal(err)
	}
	m, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Munmap(m); err != nil {
			t.Error(err)
		}
	})
	return Block{
		ID: "ram", Addr: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(m)))), Size: uint64(size), PageSize: uint64(size),
		File: f.Name(),
	}
}

// TestHugePagesThatHideMissingPages checks that Drop refuses memory that the kernel may fill with zeros, before it
// drops anything. It also checks that the proposed remedy helps.
func TestHugePagesThatHideMissingPages(t *testing.T) {
	setting, err := hugepages.Setting()
	if err != nil {
		t.Fatal(err)
	}
	if setting == "" || setting == hugepages.Deny || setting == hugepages.Force {
		testenv.CannotRun(t, "%s is %q", hugepages.ShmemEnabled, setting)
	}
	dir := tmpfsWith(t, "always")
	f, err := os.Create(filepath.Join(dir, "ram"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	self, err := process.Open(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	defer self.Close()
	mem, b := Of(nil, self), mapped(t, f)

	onKernel(t, true)
	err = mem.Drop(t.Context(), []Block{b})
	var refused *Error
	if !errors.As(err, &refused) || refused.ID != "ram" ||
		!strings.Contains(refused.Reason, dir+" is mounted with huge=always") ||
		!strings.HasSuffix(refused.Remedy, "mount -o remount,huge=never "+dir) {
		t.Fatalf("Drop = %v", err)
	}
	for name, other := range map[string]Block{
		"private":   {ID: "ram", Addr: b.Addr, PageSize: b.PageSize, Private: true},
		"hugetlbfs": {ID: "ram", Addr: b.Addr, PageSize: 2 << 20},
		"read only": {ID: "ram", Addr: b.Addr, PageSize: b.PageSize, ReadOnly: true},
	} {
		if err := mem.checkHolesKept([]Block{other}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	onKernel(t, false)
	if err := mem.checkHolesKept([]Block{b}); err != nil {
		t.Errorf("a kernel that keeps them: %v", err)
	}
	onKernel(t, true)
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT, "huge=never"); err != nil {
		t.Fatal(err)
	}
	if err := mem.checkHolesKept([]Block{b}); err != nil {
		t.Errorf("after the remedy: %v", err)
	}
}
