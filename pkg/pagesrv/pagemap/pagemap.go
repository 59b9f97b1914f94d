// SPDX-License-Identifier: Apache-2.0

// Package pagemap tells which pages of another process have content, without reading them: reading a page that was
// never touched can bring it into being.
package pagemap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A Map is the pagemap of a process (Documentation/admin-guide/mm/pagemap.rst). It refers to the memory that the
// process had when it was opened, and to no other that has its number later. Its methods may be called from any
// goroutine.
type Map struct {
	file *os.File
	fd   uintptr // file's
	// unable is set when the kernel has no PAGEMAP_SCAN, which Linux 6.7 brought, or a security module refuses it.
	unable atomic.Bool
}

// Open opens the map of a process. It needs the right to read its memory (ptrace(2), PTRACE_MODE_READ).
func Open(pid int) (*Map, error) {
	file, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", pid))
	if err != nil {
		return nil, err
	}
	return &Map{file: file, fd: file.Fd()}, nil
}

// Close closes the map.
func (m *Map) Close() error { return m.file.Close() }

// Next returns the address of the first page at or after from that has content, in memory or in swap; end where none
// before it has. A page that only reads as zero because the kernel's page of zeros is mapped there has none, as far as
// the kernel tells. Both addresses are multiples of the page size.
//
// Of memory that is shared or a file's the map says only what the process itself has mapped at the moment.
//
// The error is unix.ESRCH, wrapped, when the process has ended. Not every kernel says so: that nothing has content may
// mean that the process ended meanwhile. Ask Exists afterwards.
func (m *Map) Next(from, end uint64) (uint64, error) {
	if from >= end {
		return end, nil
	}
	if !m.unable.Load() {
		at, err := m.scan(from, end)
		if !errors.Is(err, unix.ENOTTY) && !errors.Is(err, unix.EACCES) {
			return at, err
		}
		m.unable.Store(true)
	}
	return m.walk(from, end)
}

// Exists returns unix.ESRCH, wrapped, when the process has ended: the kernel lets nobody read entries of memory that is
// being taken down (pagemap_read in Linux' fs/proc/task_mmu.c).
func (m *Map) Exists(addr uint64) error {
	_, err := m.walk(addr, addr+uint64(os.Getpagesize()))
	return err
}

// scanArgs is struct pm_scan_arg of linux/fs.h.
type scanArgs struct {
	size, flags, start, end, walkEnd uint64
	vec                              *region
	vecLen, maxPages                 uint64

	categoryInverted, categoryMask, categoryAnyofMask, returnMask uint64
}

// region is struct page_region of linux/fs.h.
type region struct {
	start uint64
	_, _  uint64 // end, categories
}

// Of linux/fs.h.
const (
	pagemapScan = 0xc0606610 // _IOWR('f', 16, struct pm_scan_arg)

	pageIsPresent = 1 << 3
	pageIsSwapped = 1 << 4
	pageIsPFNZero = 1 << 5
)

// scan asks the kernel to look for the page.
func (m *Map) scan(from, end uint64) (uint64, error) {
	var found region
	args := scanArgs{
		start: from, end: end, vec: &found, vecLen: 1, maxPages: 1,
		// It must not be the page of zeros, and must be somewhere.
		categoryInverted: pageIsPFNZero, categoryMask: pageIsPFNZero,
		categoryAnyofMask: pageIsPresent | pageIsSwapped, returnMask: pageIsPresent,
	}
	args.size = uint64(unsafe.Sizeof(args))
	n, _, errno := unix.Syscall(unix.SYS_IOCTL, m.fd, pagemapScan, uintptr(unsafe.Pointer(&args)))
	switch {
	case errno != 0:
		return 0, fmt.Errorf("PAGEMAP_SCAN from %#x to %#x: %w", from, end, errno)
	case n == 0:
		return end, nil
	}
	return found.start, nil
}

// An entry of the file: 64 bits a page.
const (
	entryBytes   = 8
	entryPresent = 1 << 63
	entrySwapped = 1 << 62
	entries      = 512 // are read at a time
)

// walk reads the entries. It takes the page of zeros for content: who may not see frame numbers cannot tell it.
func (m *Map) walk(from, end uint64) (uint64, error) {
	pageSize := uint64(os.Getpagesize())
	var buf [entries * entryBytes]byte
	for at := from; at < end; {
		want := min((end-at)/pageSize, entries)
		n, err := m.file.ReadAt(buf[:want*entryBytes], int64(at/pageSize*entryBytes))
		if err != nil && !errors.Is(err, io.EOF) {
			return 0, err
		}
		if n < entryBytes {
			return 0, fmt.Errorf("%s ends before %#x: %w", m.file.Name(), at, unix.ESRCH)
		}
		for i := 0; i+entryBytes <= n; i += entryBytes {
			if binary.LittleEndian.Uint64(buf[i:])&(entryPresent|entrySwapped) != 0 {
				return at, nil
			}
			at += pageSize
		}
	}
	return end, nil
}
