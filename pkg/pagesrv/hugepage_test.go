// SPDX-License-Identifier: Apache-2.0

package pagesrv

import (
	"bytes"
	"fmt"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/pagewire"
	"github.com/migrated-vm/migrated/pkg/testenv"
)

const hugePage = 2 << 20

// mapFile returns the path in /proc of the file of a mapping.
func mapFile(t testing.TB, memory []byte) string {
	t.Helper()
	start := uintptr(unsafe.Pointer(&memory[0]))
	return fmt.Sprintf("/proc/self/map_files/%x-%x", start, start+uintptr(len(memory)))
}

// hugePagesOf returns how many huge pages a file has. The pool of the machine says less: others use it, too.
func hugePagesOf(t *testing.T, fd int) int64 {
	t.Helper()
	var info unix.Stat_t
	if err := unix.Fstat(fd, &info); err != nil {
		t.Fatal(err)
	}
	return info.Blocks * 512 / hugePage
}

// TestHugePagesAreServedWhole: huge pages are served whole. Serving a page that the VM never touched takes none from
// the pool.
func TestHugePagesAreServedWhole(t *testing.T) {
	testenv.ReserveHugePages(t, hugePage, 4)
	// A memfd with MFD_HUGETLB is a file on hugetlbfs, for which nothing has to be mounted.
	fd, err := unix.MemfdCreate("pagesrv-test", unix.MFD_CLOEXEC|unix.MFD_HUGETLB|unix.MFD_HUGE_2MB)
	if err != nil {
		testenv.CannotRun(t, "memfd_create with huge pages: %v", err)
	}
	defer func() { _ = unix.Close(fd) }()
	const pages = 3
	if err := unix.Ftruncate(fd, pages*hugePage); err != nil {
		t.Fatal(err)
	}
	memory, err := unix.Mmap(fd, 0, pages*hugePage, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(memory) }()
	memory[hugePage-1] = 7 // the first page has data, the second one zeros, the third one is a hole
	memory[hugePage] = 0
	if n := hugePagesOf(t, fd); n != 2 {
		t.Fatalf("the file has %d huge pages, want 2", n)
	}

	_, lane := offer(t, openRAM(t, Block{
		ID: "huge", Path: fmt.Sprintf("/proc/self/fd/%d", fd), Size: pages * hugePage, PageSize: hugePage,
	}))
	var runs []pagewire.Run
	err = lane.fetch([]pagewire.Range{{Length: pages * hugePage}}, func(run pagewire.Run, data []byte) {
		runs = append(runs, run)
		if !run.Zero && !bytes.Equal(data, memory[:hugePage]) {
			t.Error("the page with data differs")
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	want := []pagewire.Run{{Length: hugePage}, {Offset: hugePage, Length: 2 * hugePage, Zero: true}}
	// The first page fills the first reply, so the others come in a second one.
	if fmt.Sprint(runs) != fmt.Sprint(want) {
		t.Errorf("runs %+v, want %+v", runs, want)
	}
	if n := hugePagesOf(t, fd); n != 2 {
		t.Errorf("serving took %d huge pages from the pool", n-2)
	}
	if memory[2*hugePage] != 0 {
		t.Error("the hole has data")
	}
	if n := hugePagesOf(t, fd); n != 3 { // so it is seen when reading takes one
		t.Errorf("the file has %d huge pages after its hole was read, want 3", n)
	}
}
