// SPDX-License-Identifier: Apache-2.0

package uffd

import (
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/uffd/internal/abi"
)

// This file is the only one that makes system calls on a userfaultfd or a pagemap.

// argument lists the structs that UFFDIO_* ioctls take.
type argument interface {
	abi.UffdioApi | abi.UffdioRange | abi.UffdioRegister | abi.UffdioCopy | abi.UffdioZeropage |
		abi.UffdioWriteprotect | abi.UffdioContinue | abi.UffdioPoison | abi.UffdioMove |
		abi.UffdioRwprotect | abi.UffdioSetMode
}

// ioctl makes one ioctl(2) with a struct that the kernel reads and writes. The struct can stay on
// the caller's stack: the conversion to uintptr is in the argument list of the call, so the runtime
// keeps the struct in place until the kernel returns.
func ioctl[T argument](fd int, request uintptr, arg *T) unix.Errno {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(unsafe.Pointer(arg)))
	return errno
}

// ioctlCopy makes UFFDIO_COPY from our memory at src. The kernel's struct holds that address as a
// number, which the garbage collector does not see. The directive keeps the memory that src points to on the
// heap and alive during the call.
//
//go:uintptrescapes
func ioctlCopy(fd int, dst uint64, src uintptr, length int, mode CopyMode) (int64, unix.Errno) {
	// Copy must be zero: a kernel that refuses early leaves it as it was.
	arg := abi.UffdioCopy{Dst: dst, Src: uint64(src), Len: uint64(length), Mode: uint64(mode)}
	errno := ioctl(fd, abi.UFFDIO_COPY, &arg)
	return arg.Copy, errno
}

// copyFrom is ioctlCopy of a slice.
func copyFrom(fd int, dst uint64, src []byte, mode CopyMode) (int64, unix.Errno) {
	return ioctlCopy(fd, dst, uintptr(unsafe.Pointer(unsafe.SliceData(src))), len(src), mode)
}

// ioctlRecorded is ioctlCopy with r as the kernel's struct.
//
//go:uintptrescapes
func ioctlRecorded(fd int, r *CopyRecord, dst uint64, src uintptr, length int, mode CopyMode) (int64, unix.Errno) {
	// Clear the old answer first: a reader must never see it together with the new address.
	atomic.StoreInt64(&r.arg.Copy, 0)
	atomic.StoreUint64(&r.arg.Dst, dst)
	r.arg.Src, r.arg.Len, r.arg.Mode = uint64(src), uint64(length), uint64(mode)
	errno := ioctl(fd, abi.UFFDIO_COPY, &r.arg)
	return atomic.LoadInt64(&r.arg.Copy), errno
}

// recordedFrom is ioctlRecorded of a slice.
func recordedFrom(fd int, r *CopyRecord, dst uint64, src []byte, mode CopyMode) (int64, unix.Errno) {
	return ioctlRecorded(fd, r, dst, uintptr(unsafe.Pointer(unsafe.SliceData(src))), len(src), mode)
}

// CopyRecords returns memory as records, one for each CopyRecordSize bytes. The records are that memory, not a copy of
// it. It returns nil if memory is not aligned to 8 bytes or has no room for a record.
func CopyRecords(memory []byte) []CopyRecord {
	if len(memory) < CopyRecordSize || uintptr(unsafe.Pointer(unsafe.SliceData(memory)))%8 != 0 {
		return nil
	}
	return unsafe.Slice((*CopyRecord)(unsafe.Pointer(unsafe.SliceData(memory))), len(memory)/CopyRecordSize)
}

// readFD is read(2). unix.Read returns the error as an interface value; readFD returns the bare errno.
func readFD(fd int, p []byte) (int, unix.Errno) {
	n, _, errno := unix.Syscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)))
	return int(n), errno
}

// preadFD is pread(2), with a bare errno as in readFD.
func preadFD(fd int, p []byte, offset uint64) (int, unix.Errno) {
	n, _, errno := unix.Syscall6(unix.SYS_PREAD64, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))),
		uintptr(len(p)), uintptr(offset), 0, 0)
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

// The kernel fills in a PageRegion: it has the layout of struct page_region. A test compares their members.
var _ = [1]struct{}{}[unsafe.Sizeof(PageRegion{})-unsafe.Sizeof(abi.PageRegion{})]

// scanArg is abi.PmScanArg with a pointer to the regions, which may be on the stack. The runtime sees the pointer and
// adjusts it when the stack moves before the system call. No stack moves during a system call.
type scanArg struct {
	size, flags, start, end, walkEnd                              uint64
	vec                                                           *PageRegion
	vecLen, maxPages                                              uint64
	categoryInverted, categoryMask, categoryAnyofMask, returnMask uint64
}

// scanArg and abi.PmScanArg have the same size and the same offsets of these members. The compiler checks it.
var (
	_ = [1]struct{}{}[unsafe.Sizeof(scanArg{})-unsafe.Sizeof(abi.PmScanArg{})]
	_ = [1]struct{}{}[unsafe.Offsetof(scanArg{}.vec)-unsafe.Offsetof(abi.PmScanArg{}.Vec)]
	_ = [1]struct{}{}[unsafe.Offsetof(scanArg{}.maxPages)-unsafe.Offsetof(abi.PmScanArg{}.MaxPages)]
	_ = [1]struct{}{}[unsafe.Offsetof(scanArg{}.returnMask)-unsafe.Offsetof(abi.PmScanArg{}.ReturnMask)]
)

// ioctlScan makes PAGEMAP_SCAN. It ends when it has found maxPages pages; 0 means no limit. The kernel writes up to
// len(regions) struct page_region to regions. n is how many, walkEnd is the address up to which the kernel looked.
func ioctlScan(
	fd int, r Range, q PageQuery, maxPages uint64, regions []PageRegion,
) (n int, walkEnd uint64, errno unix.Errno) {
	arg := scanArg{
		size: uint64(unsafe.Sizeof(scanArg{})), flags: uint64(q.Mode),
		start: r.Start, end: r.End(), vec: unsafe.SliceData(regions), vecLen: uint64(len(regions)), maxPages: maxPages,
		categoryInverted: uint64(q.Inverted), categoryMask: uint64(q.All), categoryAnyofMask: uint64(q.Any),
		returnMask: uint64(q.Return),
	}
	n1, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), abi.PAGEMAP_SCAN, uintptr(unsafe.Pointer(&arg)))
	return int(n1), arg.walkEnd, errno
}

// pageOf is the page of this process' memory that contains b.
func pageOf(b *byte) Range {
	size := uint64(unix.Getpagesize())
	return Range{Start: uint64(uintptr(unsafe.Pointer(b))) &^ (size - 1), Len: size}
}
