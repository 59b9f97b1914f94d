// SPDX-License-Identifier: Apache-2.0

package uffd

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/uffd/internal/abi"
)

// RegisterMode is the set of kinds of faults that are reported.
type RegisterMode uint64

const (
	// ModeMissing: access to a page that is missing. Answer with Copy or Zeropage.
	ModeMissing RegisterMode = abi.UFFDIO_REGISTER_MODE_MISSING

	// ModeWP: a write to a page that WriteProtect protected. Anonymous memory since Linux 5.7,
	// shmem and hugetlbfs since 5.19.
	ModeWP RegisterMode = abi.UFFDIO_REGISTER_MODE_WP

	// ModeMinor: access to a page that is in the file's page cache but not mapped here. Answer with
	// Continue. Only for shmem (Linux 5.14) and hugetlbfs (5.13).
	ModeMinor RegisterMode = abi.UFFDIO_REGISTER_MODE_MINOR

	// ModeRWP: any access to a page that RWProtect protected. Anonymous memory, shmem and hugetlbfs, on a
	// descriptor with FeatureRWP (Linux 7.3). It excludes ModeWP: both use the same bit of a page table entry.
	ModeRWP RegisterMode = abi.UFFDIO_REGISTER_MODE_RWP
)

var (
	opRegister   = newOperation("UFFDIO_REGISTER")
	opUnregister = newOperation("UFFDIO_UNREGISTER")
)

// Register makes faults of the given kinds in r readable from this descriptor. ioctls has bit n set if
// ioctl number n works on the range. hugetlbfs, for example, has no UFFDIO_ZEROPAGE; see [CanZeropage].
//
// ErrBusy: r is registered with another userfaultfd; or (Linux 7.3) r is registered with this one in ModeWP or
// ModeRWP, and mode lacks that: call Unregister first. ErrInvalid: r is not mapped or misaligned, or this kind of
// memory does not support mode. ErrPermission: r is shared memory of a file that the process may not write.
// ErrNoMemory: out of memory, or the process is gone.
func (u *UFFD) Register(r Range, mode RegisterMode) (ioctls uint64, err error) {
	if !u.acquire() {
		return 0, opRegister.closed
	}
	defer u.release()
	arg := abi.UffdioRegister{Range: abi.UffdioRange{Start: r.Start, Len: r.Len}, Mode: uint64(mode)}
	if errno := ioctl(u.fd, abi.UFFDIO_REGISTER, &arg); errno != 0 {
		return 0, fmt.Errorf("range %v: %w", r, opRegister.err(errno))
	}
	return arg.Ioctls, nil
}

// CanZeropage reports whether Zeropage works on a range. ioctls is what Register returned for it.
func CanZeropage(ioctls uint64) bool { return ioctls&(1<<abi.Nr_UFFDIO_ZEROPAGE) != 0 }

// CanPoison reports whether Poison works on a range. ioctls is what Register returned for it.
func CanPoison(ioctls uint64) bool { return ioctls&(1<<abi.Nr_UFFDIO_POISON) != 0 }

// Unregister ends the registration of r and lifts the protection of its pages. A page that is still missing reads as
// zeros from now on. Unregister wakes the threads that wait in memory registered with ModeMissing. Threads that wait
// in other memory stay asleep until Wake (mm/userfaultfd.c, userfaultfd_unregister).
func (u *UFFD) Unregister(r Range) error {
	if errno, ok := u.rangeIoctl(abi.UFFDIO_UNREGISTER, r); !ok {
		return opUnregister.closed
	} else if errno != 0 {
		return fmt.Errorf("range %v: %w", r, opUnregister.err(errno))
	}
	return nil
}

var opWake = newOperation("UFFDIO_WAKE")

// Wake wakes the threads that wait for a page in r. They repeat the access, and fault again if the page is still
// missing. Call it after a fill with a DontWake mode and after ErrExist.
func (u *UFFD) Wake(r Range) error {
	errno, ok := u.rangeIoctl(abi.UFFDIO_WAKE, r)
	if !ok {
		return opWake.closed
	}
	return opWake.err(errno)
}

// rangeIoctl makes one of the ioctls whose only argument is a range. ok is false after Close.
func (u *UFFD) rangeIoctl(request uintptr, r Range) (errno unix.Errno, ok bool) {
	if !u.acquire() {
		return 0, false
	}
	defer u.release()
	arg := abi.UffdioRange{Start: r.Start, Len: r.Len}
	return ioctl(u.fd, request, &arg), true
}
