// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// These are ptrace(2) requests that golang.org/x/sys/unix has no function for. All of them must run on the
// tracer's thread.

func ptrace(request, tid int, addr, data uintptr) error {
	if _, _, errno := unix.Syscall6(unix.SYS_PTRACE, uintptr(request), uintptr(tid), addr, data, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// ptraceAt makes a request that reads or writes our memory at data. The conversion to uintptr must be in the argument
// list of Syscall6: otherwise a growing stack may move what data points to.
func ptraceAt(request, tid int, addr uintptr, data unsafe.Pointer) error {
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, uintptr(request), uintptr(tid), addr, uintptr(data), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// siginfo is the head of siginfo_t, padded to the full 128 bytes the kernel writes.
type siginfo struct {
	signo, errno, code int32
	_                  [116]byte
}

func getSiginfo(tid int) (siginfo, error) {
	var si siginfo
	err := ptraceAt(unix.PTRACE_GETSIGINFO, tid, 0, unsafe.Pointer(&si))
	return si, err
}

// sigset is the kernel's 64-bit signal set; signal n is bit n-1.
type sigset uint64

func (s sigset) without(sig unix.Signal) sigset { return s &^ (1 << (sig - 1)) }

func getSigmask(tid int) (sigset, error) {
	var set sigset
	err := ptraceAt(unix.PTRACE_GETSIGMASK, tid, unsafe.Sizeof(set), unsafe.Pointer(&set))
	return set, err
}

func setSigmask(tid int, set sigset) error {
	return ptraceAt(unix.PTRACE_SETSIGMASK, tid, unsafe.Sizeof(set), unsafe.Pointer(&set))
}

// syscallInfo is struct ptrace_syscall_info of linux/ptrace.h. Two variants of the union share the member word: it is
// the call's number at an entry stop and its result at an exit stop.
type syscallInfo struct {
	op   uint8
	_    [3]uint8
	arch uint32
	ip   uint64
	sp   uint64
	word uint64
	_    [48]byte
}

func getSyscallInfo(tid int) (syscallInfo, error) {
	var info syscallInfo
	err := ptraceAt(unix.PTRACE_GET_SYSCALL_INFO, tid, unsafe.Sizeof(info), unsafe.Pointer(&info))
	return info, err
}

// pendingSiginfo lists the pending signals of this thread, without those of the process as a whole. The signals stay
// in the queue.
func pendingSiginfo(tid int) ([]siginfo, error) {
	args := struct { // struct ptrace_peeksiginfo_args
		off   uint64
		flags uint32
		nr    int32
	}{nr: 32}
	var list [32]siginfo
	n, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_PEEKSIGINFO, uintptr(tid),
		uintptr(unsafe.Pointer(&args)), uintptr(unsafe.Pointer(&list)), 0, 0)
	if errno != 0 {
		return nil, errno
	}
	return list[:n], nil
}
