// SPDX-License-Identifier: Apache-2.0

package uffd

import (
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/uffd/internal/abi"
)

// Pagemap is an open /proc/PID/pagemap: it says which pages are in a process's address space. It stays with the address
// space that the process had when it was opened, also after execve(2). Every method may be called from several
// goroutines at once. There is no finalizer: the caller must Close it.
type Pagemap struct {
	descriptor

	// unable is set when the kernel has no PAGEMAP_SCAN, or a security module refuses it. Next then reads entries.
	unable atomic.Bool
}

// OpenPagemap opens the pagemap of process pid, which may be this one. The error is ErrProcessGone if there is no such
// process, or if it has no memory, as a kernel thread. It is fs.ErrPermission if ptrace(2) would not permit reading
// that process' memory (PTRACE_MODE_READ_FSCREDS).
//
// A process that [os/exec] has just started may still have the memory of this one for a moment, because execve(2)
// closes descriptors before it changes the memory (fs/exec.c, begin_new_exec). OpenPagemap then opens the pagemap of
// this process's memory. Wait until the process answers.
func OpenPagemap(pid int) (*Pagemap, error) {
	path := "/proc/" + strconv.Itoa(pid) + "/pagemap"
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	switch {
	case err == nil:
		return &Pagemap{descriptor: descriptor{fd: fd}}, nil
	case errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH):
		return nil, fmt.Errorf("open %s: %w", path, ErrProcessGone)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("open %s: %w: it needs the permission to trace that process, as CAP_SYS_PTRACE gives it",
			path, err)
	}
	return nil, fmt.Errorf("open %s: %w", path, err)
}

// Close closes the pagemap once the calls that are under way have returned. It does not wait for them. A second Close
// does nothing. Later calls of other methods fail with [os.ErrClosed].
func (p *Pagemap) Close() error { return p.close() }

// PageQuery chooses pages by their categories. A page is chosen if it matches every category in All and, unless Any is
// empty, at least one in Any. A page matches a category if it is in that category; for categories in Inverted, if it is
// not.
type PageQuery struct {
	All, Any, Inverted Categories

	// Return are the categories to report in PageRegion.Categories. Adjacent pages with the same ones form one region.
	Return Categories

	Mode ScanMode
}

// ScanMode says what Scan does besides looking.
type ScanMode uint64

const (
	// ScanProtect protects each chosen page that is in PageWritten against writing, as WriteProtect does. The kernel
	// looks at the page and protects it in one step. It skips memory that is not in PageWPAllowed.
	ScanProtect ScanMode = abi.PM_SCAN_WP_MATCHING

	// ScanCheckWPAsync ends the scan with ErrPermission at memory that is not in PageWPAllowed.
	ScanCheckWPAsync ScanMode = abi.PM_SCAN_CHECK_WPASYNC
)

// PageRegion is a range of adjacent pages: [Start, End), in bytes.
type PageRegion struct {
	Start, End uint64
	Categories Categories // of the pages, as far as they are in PageQuery.Return
}

// Range is the range of the pages.
func (r PageRegion) Range() Range { return Range{Start: r.Start, Len: r.End - r.Start} }

var opScan = func() *operation {
	op := newOperation("PAGEMAP_SCAN")
	// See askCategories.
	op.byErr[unix.ENOTTY] = &NotSupportedError{Feature: "PAGEMAP_SCAN", MinKernel: scanSince.String()}
	return op
}()

// Scan looks for the pages in r that q chooses, and fills the first n of regions with them, in the order of their
// addresses. r may have holes. Scan ends early when regions is full. rest is the part of r that is left; its length is
// 0 at the end. The caller owns regions, which must not be empty; more room means fewer calls. Scan does not allocate.
//
//	for rest := r; rest.Len > 0; {
//		if n, rest, err = p.Scan(rest, q, regions); err != nil {
//			return err
//		}
//		use(regions[:n])
//	}
//
// Pages may change during a scan: each page is reported as it was at one moment.
//
// The error is a *NotSupportedError if the kernel lacks PAGEMAP_SCAN (Linux 6.7) or a category of q. ErrInvalid: r
// is misaligned (with ScanProtect in hugetlbfs, to huge pages) or regions is empty. ErrProcessGone: the process has
// exited. Some kernels then find no page and return no error (6.18.44 does; 6.12.117 and 7.3 return the error). With
// an error, n is 0, rest is r, and ScanProtect may have protected some pages already.
//
// Source: PAGEMAP_SCAN(2const); Documentation/admin-guide/mm/pagemap.rst; fs/proc/task_mmu.c, do_pagemap_scan.
func (p *Pagemap) Scan(r Range, q PageQuery, regions []PageRegion) (n int, rest Range, err error) {
	if len(regions) == 0 { // the kernel would return no region
		return 0, r, opScan.err(unix.EINVAL)
	}
	if !p.acquire() {
		return 0, r, opScan.closed
	}
	n, walkEnd, errno := ioctlScan(p.fd, r, q, 0, regions)
	p.release()
	switch {
	case errno == unix.EINVAL:
		// The reason may be a category that the kernel does not have.
		if err := HaveCategories(q.All | q.Any | q.Inverted | q.Return); errors.Is(err, ErrNotSupported) {
			return 0, r, err
		}
		return 0, r, opScan.err(errno)
	case errno != 0:
		return 0, r, opScan.err(errno)
	case walkEnd >= r.End():
		return n, Range{Start: r.End()}, nil
	case n == len(regions): // walkEnd may be before the end of the last region, see kernelRegions
		next := max(walkEnd, regions[n-1].End)
		return n, Range{Start: next, Len: r.End() - next}, nil
	case n < kernelRegions: // ScanProtect of a part of a huge page (hugetlbfs), which the kernel skipped
		return 0, r, opScan.err(unix.EINVAL)
	}
	// Room was left, so the kernel reached the end. walkEnd is where it last wrote regions out.
	return n, Range{Start: r.End()}, nil
}

// kernelRegions is how many regions the kernel collects, at least, before it writes them out (PAGEMAP_WALK_SIZE in
// pages; more where pages are larger than 4 KiB). It then sets walk_end to its position and continues. If it reaches
// the end after that, it does not set walk_end again (fs/proc/task_mmu.c, do_pagemap_scan; Linux 6.7 to 7.3).
const kernelRegions = 512
