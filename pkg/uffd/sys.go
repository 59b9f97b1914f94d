// SPDX-License-Identifier: Apache-2.0

package uffd

import (
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/uffd/internal/abi"
)

// This file is the only one that makes system calls on a userfaultfd and the only one with unsafe.

// argument lists the structs that UFFDIO_* ioctls take.
type argument interface {
	abi.UffdioApi | abi.UffdioRange | abi.UffdioRegister | abi.UffdioCopy | abi.UffdioZeropage |
		abi.UffdioWriteprotect | abi.UffdioContinue | abi.UffdioPoison | abi.UffdioMove
}

// ioctl makes one ioctl(2) with a struct that the kernel reads and writes. The struct stays on
// the caller's stack: the conversion stands in the call itself, so it is kept in place until the
// kernel returns.
func ioctl[T argument](fd int, request uintptr, arg *T) unix.Errno {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(unsafe.Pointer(arg)))
	return errno
}

// ioctlCopy makes UFFDIO_COPY from our memory at src. The kernel's struct holds that address as a
// number, which the garbage collector does not see: the directive keeps what src was made from on the
// heap and alive during the call.
//
//go:uintptrescapes
func ioctlCopy(fd int, dst uint64, src uintptr, length int, mode CopyMode) (int64, unix.Errno) {
	// Copy must be zero: a kernel that refuses early leaves it as it was.
	arg := abi.UffdioCopy{Dst: dst, Src: uint64(src), Len: uint64(length), Mode: uint64(mode)}
	errno := ioctl(fd, abi.UFFDIO_COPY, &arg)
	return arg.Copy, errno
}

// copyFrom is ioctlCopy with a slice.
func copyFrom(fd int, dst uint64, src []byte, mode CopyMode) (int64, unix.Errno) {
	return ioctlCopy(fd, dst, uintptr(unsafe.Pointer(unsafe.SliceData(src))), len(src), mode)
}

// ioctlRecorded is ioctlCopy with the kernel's struct in memory of the caller's choice.
//
//go:uintptrescapes
func ioctlRecorded(fd int, r *CopyRecord, dst uint64, src uintptr, length int, mode CopyMode) (int64, unix.Errno) {
	// The old answer goes first: at no instant may it stand beside the new address.
	atomic.StoreInt64(&r.arg.Copy, 0)
	atomic.StoreUint64(&r.arg.Dst, dst)
	r.arg.Src, r.arg.Len, r.arg.Mode = uint64(src), uint64(length), uint64(mode)
	errno := ioctl(fd, abi.UFFDIO_COPY, &r.arg)
	return atomic.LoadInt64(&r.arg.Copy), errno
}

// recordedFrom is ioctlRecorded with a slice.
func recordedFrom(fd int, r *CopyRecord, dst uint64, src []byte, mode CopyMode) (int64, unix.Errno) {
	return ioctlRecorded(fd, r, dst, uintptr(unsafe.Pointer(unsafe.SliceData(src))), len(src), mode)
}

// CopyRecords makes records of memory, which must be aligned to 8 bytes: one for each CopyRecordSize bytes. They are that
// memory, not a copy of it.
func CopyRecords(memory []byte) []CopyRecord {
	if len(memory) < CopyRecordSize || uintptr(unsafe.Pointer(unsafe.SliceData(memory)))%8 != 0 {
		return nil
	}
	return unsafe.Slice((*CopyRecord)(unsafe.Pointer(unsafe.SliceData(memory))), len(memory)/CopyRecordSize)
}

// readFD is read(2). unix.Read would do, but gives the error as an interface value.
func readFD(fd int, p []byte) (int, unix.Errno) {
	n, _, errno := unix.Syscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)))
	return int(n), errno
}

// sysUserfaultfd is userfaultfd(2).
func sysUserfaultfd(flags uintptr) (int, unix.Errno) {
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, flags, 0, 0)
	return int(fd), errno
}

// ioctlNew is USERFAULTFD_IOC_NEW on an open /dev/userfaultfd; the argument is a value.
func ioctlNew(dev int, flags uintptr) (int, unix.Errno) {
	fd, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(dev), abi.USERFAULTFD_IOC_NEW, flags)
	return int(fd), errno
}
