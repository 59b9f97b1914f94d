// SPDX-License-Identifier: Apache-2.0

package uffd

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/uffd/internal/abi"
)

// Categories is a set of PAGE_IS_* bits: what PAGEMAP_SCAN says about a page.
type Categories uint64

// The categories of a page. Where memory is mapped but no page is there, it is in no category, or in PageWritten.
const (
	// PageWPAllowed: the memory is registered with ModeWP on a descriptor with FeatureWPAsync.
	PageWPAllowed Categories = abi.PAGE_IS_WPALLOWED

	// PageWritten: the page was written to, or discarded, since it was write-protected, or it never was
	// write-protected. Before Linux 7.3, pages of memory that is not registered with ModeWP are PageWritten too.
	PageWritten Categories = abi.PAGE_IS_WRITTEN

	PageFile    Categories = abi.PAGE_IS_FILE    // belongs to a file; a tmpfs or memfd counts
	PagePresent Categories = abi.PAGE_IS_PRESENT // mapped and in memory
	PageSwapped Categories = abi.PAGE_IS_SWAPPED // swapped out, or being migrated to another place in memory
	PagePFNZero Categories = abi.PAGE_IS_PFNZERO // the kernel's page of zeros
	PageHuge    Categories = abi.PAGE_IS_HUGE    // part of a huge page, hugetlbfs or transparent, mapped as one

	// PageSoftDirty: written to since 4 was written to /proc/PID/clear_refs.
	PageSoftDirty Categories = abi.PAGE_IS_SOFT_DIRTY

	// PageGuard: access gives SIGSEGV, because of MADV_GUARD_INSTALL.
	PageGuard Categories = abi.PAGE_IS_GUARD

	// PageAccessed: the page was accessed since RWProtect, or installed after it. That is a page, in memory or
	// swapped out, that is registered with ModeRWP and not protected.
	PageAccessed Categories = abi.PAGE_IS_ACCESSED
)

// categoryTable lists the categories in the order of their bits, each with the first kernel that has it.
var categoryTable = capabilities[Categories]{
	{PageWPAllowed, "PAGE_IS_WPALLOWED", scanSince},
	{PageWritten, "PAGE_IS_WRITTEN", scanSince},
	{PageFile, "PAGE_IS_FILE", scanSince},
	{PagePresent, "PAGE_IS_PRESENT", scanSince},
	{PageSwapped, "PAGE_IS_SWAPPED", scanSince},
	{PagePFNZero, "PAGE_IS_PFNZERO", scanSince},
	{PageHuge, "PAGE_IS_HUGE", scanSince},
	{PageSoftDirty, "PAGE_IS_SOFT_DIRTY", scanSince},
	{PageGuard, "PAGE_IS_GUARD", kernelVersion{6, 16}},
	{PageAccessed, "PAGE_IS_ACCESSED", kernelVersion{7, 3}},
}

// scanSince is the first kernel with PAGEMAP_SCAN.
var scanSince = kernelVersion{6, 7}

// String lists the names, joined by "|".
func (c Categories) String() string { return categoryTable.names(c) }

var kernelCategories probe[Categories]

// ProbeCategories returns the categories that the running kernel has. For each category it scans one page of this
// process. It needs no privilege. Before Linux 6.7 there are none.
func ProbeCategories() (Categories, error) { return kernelCategories.get(askCategories) }

// HaveCategories returns nil if the kernel has all of want, a *NotSupportedError that names those it lacks, or another
// error if the kernel could not be asked.
func HaveCategories(want Categories) error {
	have, err := ProbeCategories()
	if err != nil {
		return err
	}
	if missing := want &^ have; missing != 0 {
		return categoryTable.notSupported(missing)
	}
	return nil
}

func askCategories() (have Categories, err error) {
	p, err := OpenPagemap(os.Getpid())
	if err != nil {
		return 0, fmt.Errorf("asking the kernel for its categories of pages: %w", err)
	}
	defer p.Close()
	page, regions := new(byte), make([]PageRegion, 1)
	for _, c := range categoryTable {
		_, _, errno := ioctlScan(p.fd, pageOf(page), PageQuery{All: c.bit, Return: c.bit}, 0, regions)
		switch errno {
		case 0:
			have |= c.bit
		case unix.EINVAL, unix.ENOTTY: // ENOTTY: before PAGEMAP_SCAN there were no ioctls on this file
		default:
			return 0, fmt.Errorf("asking the kernel for %v: %w", c.bit, opScan.err(errno))
		}
	}
	return have, nil
}
