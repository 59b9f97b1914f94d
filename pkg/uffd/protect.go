// SPDX-License-Identifier: Apache-2.0

package uffd

import "github.com/migrated-vm/migrated/pkg/uffd/internal/abi"

// WPMode says what WriteProtect does.
type WPMode uint64

const (
	// WPProtect protects. Without it, WriteProtect lifts the protection and wakes the writers.
	WPProtect WPMode = abi.UFFDIO_WRITEPROTECT_MODE_WP

	// WPDontWake lifts the protection and leaves the writers asleep until Wake. It excludes WPProtect.
	WPDontWake WPMode = abi.UFFDIO_WRITEPROTECT_MODE_DONTWAKE
)

var opWriteProtect = newOperation("UFFDIO_WRITEPROTECT")

// WriteProtect protects the pages of r against writing, or lifts the protection (mode 0). r must be registered
// with ModeWP (otherwise ErrNotRegistered). It does all of r or fails. On ErrAgain, read events and repeat.
func (u *UFFD) WriteProtect(r Range, mode WPMode) error {
	if !u.acquire() {
		return opWriteProtect.closed
	}
	arg := abi.UffdioWriteprotect{Range: abi.UffdioRange{Start: r.Start, Len: r.Len}, Mode: uint64(mode)}
	errno := ioctl(u.fd, abi.UFFDIO_WRITEPROTECT, &arg)
	u.release()
	return opWriteProtect.err(errno)
}

// RWPMode says what RWProtect does.
type RWPMode uint64

const (
	// RWPProtect protects. Without it, RWProtect lifts the protection and wakes the threads that wait.
	RWPProtect RWPMode = abi.UFFDIO_RWPROTECT_MODE_RWP

	// RWPDontWake lifts the protection and leaves the threads asleep until Wake. It excludes RWPProtect.
	RWPDontWake RWPMode = abi.UFFDIO_RWPROTECT_MODE_DONTWAKE
)

var opRWProtect = newOperation("UFFDIO_RWPROTECT")

// RWProtect protects the pages of r against reading and writing, or lifts the protection (mode 0). r must be registered
// with ModeRWP (otherwise ErrNotRegistered). It does all of r or fails. On ErrAgain, read events and repeat.
//
// It protects the pages that are mapped now. The protection of a page ends when the page is discarded. A page that is
// installed or mapped from the page cache later is not protected, and RWProtect does not report it. Call RWProtect
// again for each interval of time.
//
// FeatureRWPAsync decides what an access to a protected page does. Without it, the thread waits and Read gets FaultRWP;
// answer with RWProtect of the page and mode 0. With it, the kernel lifts the protection of the page and no thread
// waits; [Pagemap.Scan] finds these pages by PageAccessed.
//
// Source: Documentation/admin-guide/mm/userfaultfd.rst, "Read-Write Protection"; mm/userfaultfd.c, mrwprotect_range.
func (u *UFFD) RWProtect(r Range, mode RWPMode) error {
	if !u.acquire() {
		return opRWProtect.closed
	}
	arg := abi.UffdioRwprotect{Range: abi.UffdioRange{Start: r.Start, Len: r.Len}, Mode: uint64(mode)}
	errno := ioctl(u.fd, abi.UFFDIO_RWPROTECT, &arg)
	u.release()
	return opRWProtect.err(errno)
}

var opSetMode = newOperation("UFFDIO_SET_MODE")

// SetMode enables and disables features after the handshake. Only FeatureRWPAsync can be changed (Linux 7.3), and only
// if API enabled FeatureRWP. ErrInvalid: any other feature, or one that is in both sets. When SetMode has returned, no
// access is handled in the old way. Enabling FeatureRWPAsync wakes all threads that wait for an RWProtect.
//
// Source: mm/userfaultfd.c, userfaultfd_set_mode.
func (u *UFFD) SetMode(enable, disable Features) error {
	if !u.acquire() {
		return opSetMode.closed
	}
	arg := abi.UffdioSetMode{Enable: uint64(enable), Disable: uint64(disable)}
	errno := ioctl(u.fd, abi.UFFDIO_SET_MODE, &arg)
	u.release()
	return opSetMode.err(errno)
}
