// SPDX-License-Identifier: Apache-2.0

package uffd

import (
	"encoding/binary"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// hasContent chooses the pages that have content: they are in memory or swapped out, and not the kernel's page of
// zeros.
var hasContent = PageQuery{
	All: PagePFNZero, Inverted: PagePFNZero, Any: PagePresent | PageSwapped, Return: PagePresent,
}

// Next returns the address of the first page in [from, end) that has content, in memory or in swap. If no page has,
// it returns end. from and end are multiples of the page size. Next does not read the page, because the kernel may
// allocate a page that is read for the first time. The kernel's page of zeros is no content; without PAGEMAP_SCAN, Next
// cannot recognize it and takes it for content. Next does not allocate, and works on kernels without PAGEMAP_SCAN, too.
//
// In shared memory and in files, Next finds only pages that the process itself has mapped at the moment.
//
// The error is unix.ESRCH, wrapped, when the process has ended. Some kernels report no content instead of this error:
// call Exists afterwards to tell the two apart.
func (p *Pagemap) Next(from, end uint64) (uint64, error) {
	if from >= end {
		return end, nil
	}
	if !p.acquire() {
		return 0, opScan.closed
	}
	defer p.release()
	if p.unable.Load() {
		return p.walk(from, end)
	}
	var found [1]PageRegion
	n, _, errno := ioctlScan(p.fd, Range{Start: from, Len: end - from}, hasContent, 1, found[:])
	switch {
	case errno == unix.ENOTTY || errno == unix.EACCES:
		p.unable.Store(true)
		return p.walk(from, end)
	case errno != 0:
		return 0, fmt.Errorf("PAGEMAP_SCAN from %#x to %#x: %w", from, end, errno)
	case n == 0:
		return end, nil
	}
	return found[0].Start, nil
}

// Exists returns unix.ESRCH, wrapped, when the process has ended: the kernel does not let entries be read once the
// address space is torn down (pagemap_read in Linux' fs/proc/task_mmu.c). addr is the address of a page.
func (p *Pagemap) Exists(addr uint64) error {
	if !p.acquire() {
		return opScan.closed
	}
	defer p.release()
	_, err := p.walk(addr, addr+uint64(os.Getpagesize()))
	return err
}

// The file has one entry of 64 bits for each page (Documentation/admin-guide/mm/pagemap.rst).
const (
	entryBytes   = 8
	entryPresent = 1 << 63
	entrySwapped = 1 << 62
	entries      = 512 // read at a time
)

// walk implements Next by reading the entries. It takes the page of zeros for content: without permission to see frame
// numbers, the two look alike. The caller has acquired the descriptor.
func (p *Pagemap) walk(from, end uint64) (uint64, error) {
	pageSize := uint64(os.Getpagesize())
	var buf [entries * entryBytes]byte
	for at := from; at < end; {
		want := min((end-at)/pageSize, entries)
		n, errno := preadFD(p.fd, buf[:want*entryBytes], at/pageSize*entryBytes)
		switch {
		case errno == unix.EINTR:
			continue
		case errno != 0:
			return 0, fmt.Errorf("read the pagemap at %#x: %w", at, errno)
		case n < entryBytes:
			return 0, fmt.Errorf("the pagemap ends before %#x: %w", at, unix.ESRCH)
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
