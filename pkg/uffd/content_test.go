// SPDX-License-Identifier: Apache-2.0

package uffd

import (
	"encoding/binary"
	"errors"
	"os"
	"slices"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// TestNext checks that Next finds the pages that were written to, by a scan and by reading the entries.
func TestNext(t *testing.T) {
	const pages = 4096
	pageSize := os.Getpagesize()
	memory, err := unix.Mmap(-1, 0, pages*pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Munmap(memory); err != nil {
			t.Error(err)
		}
	}()
	// EINVAL: the kernel has no transparent huge pages.
	if err := unix.Madvise(memory, unix.MADV_NOHUGEPAGE); err != nil && !errors.Is(err, unix.EINVAL) {
		t.Fatal(err)
	}
	start := uint64(uintptr(unsafe.Pointer(&memory[0])))
	touched := []int{7, 8, 1500, pages - 1}
	for _, p := range touched {
		memory[p*pageSize] = 1
	}
	zeros := memory[100*pageSize] // maps the kernel's page of zeros there
	m, err := OpenPagemap(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	for name, c := range map[string]struct {
		next func(from, end uint64) (uint64, error)
		want []int
	}{
		"scan": {m.Next, withContent(t, start, touched, 100)},
		"walk": {m.walk, []int{7, 8, 100, 1500, pages - 1}}, // the page of zeros counts: entries do not show that it is one
	} {
		end := start + uint64(len(memory))
		var got []int
		for at := start; ; at += uint64(pageSize) {
			if at, err = c.next(at, end); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if at == end {
				break
			}
			got = append(got, int(at-start)/pageSize)
		}
		if m.unable.Load() && name == "scan" {
			t.Log("this kernel has no PAGEMAP_SCAN")
			continue
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: pages %v, want %v; entry %#x", name, got, c.want,
				entryAt(t, "/proc/self/pagemap", start/uint64(pageSize)+100))
		}
	}
	if zeros != 0 {
		t.Error("a page that nobody wrote to is not zero")
	}
}

// withContent returns the pages that a scan must find: those that were written to, and the page read, which was only
// read, if the kernel gave it its own frame. The kernel may choose; /proc/kpageflags shows what it did.
func withContent(t *testing.T, start uint64, written []int, read int) []int {
	t.Helper()
	const (
		frame    = 1<<55 - 1 // the frame number in an entry of /proc/PID/pagemap
		zeroPage = 1 << 24   // KPF_ZERO_PAGE of linux/kernel-page-flags.h
	)
	entry := entryAt(t, "/proc/self/pagemap", start/uint64(os.Getpagesize())+uint64(read))
	if entry&frame == 0 {
		t.Skip("frame numbers are for CAP_SYS_ADMIN")
	}
	if flags := entryAt(t, "/proc/kpageflags", entry&frame); flags&zeroPage == 0 {
		t.Logf("page %d was read, and has a frame of its own: entry %#x, flags %#x", read, entry, flags)
		written = slices.Sorted(slices.Values(append([]int{read}, written...)))
	}
	return written
}

// entryAt reads one of the 64-bit entries of a file.
func entryAt(t *testing.T, path string, index uint64) uint64 {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, entryBytes)
	if _, err := f.ReadAt(b, int64(index*entryBytes)); err != nil {
		t.Fatal(err)
	}
	return binary.NativeEndian.Uint64(b)
}

// TestNextOfNothing checks that an empty range has no page with content.
func TestNextOfNothing(t *testing.T) {
	m, err := OpenPagemap(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if at, err := m.Next(4096, 4096); err != nil || at != 4096 {
		t.Errorf("%d, %v", at, err)
	}
}

// TestNextAllocatesNothing checks that Next does not allocate: the page server calls it during the sweep to find holes.
func TestNextAllocatesNothing(t *testing.T) {
	m, err := OpenPagemap(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	memory := make([]byte, 1<<20)
	start := uint64(uintptr(unsafe.Pointer(&memory[0]))) &^ 4095
	for _, unable := range []bool{false, true} {
		m.unable.Store(unable)
		if n := testing.AllocsPerRun(100, func() {
			if _, err := m.Next(start, start+1<<20); err != nil {
				t.Error(err)
			}
		}); n != 0 {
			t.Errorf("%v allocations, without PAGEMAP_SCAN: %t", n, unable)
		}
	}
}

// TestNextAfterClose checks that Next fails after Close: the descriptor's number may belong to another file then.
func TestNextAfterClose(t *testing.T) {
	m, err := OpenPagemap(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Next(0, 4096); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Next: %v", err)
	}
	if err := m.Exists(0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Exists: %v", err)
	}
}
