// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// syscallInstruction is `syscall`. It overwrites rcx and r11, and rax with the result.
var syscallInstruction = []byte{0x0f, 0x05}

// auditArch is AUDIT_ARCH_X86_64, the architecture a seccomp filter is told.
const auditArch = 0xc000003e

// regs are all general registers. Floating point and vector state is not touched by a system call.
type regs unix.PtraceRegs

func supported() error { return nil }

func getRegs(tid int) (regs, error) {
	var r unix.PtraceRegs
	err := unix.PtraceGetRegs(tid, &r)
	return regs(r), err
}

func setRegs(tid int, r *regs) error {
	return unix.PtraceSetRegs(tid, (*unix.PtraceRegs)(r))
}

// check refuses a 32-bit process: `syscall` has other numbers and another calling convention there.
func (r *regs) check() error {
	const userCS64 = 0x33 // __USER_CS of arch/x86/include/asm/segment.h
	if r.Cs != userCS64 {
		return fmt.Errorf("it runs 32-bit code: %w", ErrUnsupported)
	}
	return nil
}

// forCall returns registers with which the next instruction makes the system call.
func (r *regs) forCall(insn uint64, nr uintptr, args []uintptr) regs {
	c := *r
	c.Rip = insn
	c.Rax = uint64(nr)
	for i, reg := range []*uint64{&c.Rdi, &c.Rsi, &c.Rdx, &c.R10, &c.R8, &c.R9}[:len(args)] {
		*reg = uint64(args[i])
	}
	c.forgetCall()
	return c
}

// forgetCall says that the thread is not in a system call. Otherwise, if rax happened to look like
// -ERESTARTSYS, the kernel would 'restart' and move rip back by the length of the instruction.
func (r *regs) forgetCall() { r.Orig_rax = ^uint64(0) }

// eintrCalls are blocking calls that answer any interruption with EINTR, even one without a signal handler,
// such as ours (signal(7), 'Interruption of system calls and library functions by stop signals').
var eintrCalls = map[uint64]bool{
	unix.SYS_EPOLL_WAIT:      true,
	unix.SYS_EPOLL_PWAIT:     true,
	unix.SYS_EPOLL_PWAIT2:    true,
	unix.SYS_RT_SIGTIMEDWAIT: true,
	unix.SYS_SEMOP:           true,
	unix.SYS_SEMTIMEDOP:      true,
	unix.SYS_IO_GETEVENTS:    true,
	unix.SYS_IO_URING_ENTER:  true,
}

// keepCallGoing replaces the EINTR with which such a call ended because of our stop by -ERESTARTNOHAND: 'if a
// handler is going to run, the call returns EINTR, else repeat it'. So a signal that has really arrived still
// has its effect.
func (r *regs) keepCallGoing() (changed bool) {
	const eRestartNoHand = 514 // include/linux/errno.h
	if !eintrCalls[r.Orig_rax] || int64(r.Rax) != -int64(unix.EINTR) {
		return false
	}
	r.Rax = ^uint64(eRestartNoHand - 1)
	return true
}
