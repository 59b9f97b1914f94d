// SPDX-License-Identifier: Apache-2.0

package uffd

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/uffd/internal/abi"
)

// RegisterMode is the set of faults to be told of.
type RegisterMode uint64

const (
	// ModeMissing: no page is there. Answer with Copy or Zeropage.
	ModeMissing RegisterMode = abi.UFFDIO_REGISTER_MODE_MISSING

	// ModeWP: a write to a page that WriteProtect protected. Anonymous memory since Linux 5.7,
	// shmem and hugetlbfs since 5.19.
	ModeWP RegisterMode = abi.UFFDIO_REGISTER_MODE_WP

	// ModeMinor: the page is in the file's page cache but not mapped here. Answer with
	// Continue. shmem (5.14) and hugetlbfs (5.13) only.
	ModeMinor RegisterMode = abi.UFFDIO_REGISTER_MODE_MINOR
)

var (
	opRegister   = newOperation("UFFDIO_REGISTER")
	opUnregister = newOperation("UFFDIO_UNREGISTER")
)

// Register makes faults of the given kinds in r readable from this descriptor. ioctls has bit n set if
// ioctl number n can be used on the range: hugetlbfs, for one, has no UFFDIO_ZEROPAGE; see [CanZeropage].
//
// ErrBusy: another userfaultfd has it. ErrInvalid: not mapped, misaligned, or a mode this kind of memory does not have.
// ErrPermission: shared memory of a file which the process may not write. ErrNoMemory: also a process that is gone.
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

// CanZeropage says whether Zeropage works on a range for which Register answered with ioctls.
func CanZeropage(ioctls uint64) bool { return ioctls&(1<<abi.Nr_UFFDIO_ZEROPAGE) != 0 }

// Unregister ends the supervision of r and wakes every thread that waits in it: a page still missing
// reads as zeros from now on.
func (u *UFFD) Unregister(r Range) error {
	if errno, ok := u.rangeIoctl(abi.UFFDIO_UNREGISTER, r); !ok {
		return opUnregister.closed
	} else if errno != 0 {
		return fmt.Errorf("range %v: %w", r, opUnregister.err(errno))
	}
	return nil
}

var opWake = newOperation("UFFDIO_WAKE")

// Wake wakes the threads that wait for a page in r; they look again, and fault again if it is still
// missing. Needed after a fill with a DontWake mode and after ErrExist.
func (u *UFFD) Wake(r Range) error {
	errno, ok := u.rangeIoctl(abi.UFFDIO_WAKE, r)
	if !ok {
		return opWake.closed
	}
	return opWake.err(errno)
}

// rangeIoctl makes one of the ioctls that take nothing but a range. It says !ok after Close.
func (u *UFFD) rangeIoctl(request uintptr, r Range) (errno unix.Errno, ok bool) {
	if !u.acquire() {
		return 0, false
	}
	defer u.release()
	arg := abi.UffdioRange{Start: r.Start, Len: r.Len}
	return ioctl(u.fd, request, &arg), true
}
