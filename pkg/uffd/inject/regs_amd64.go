// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// syscallInstruction is `syscall`. It overwrites rcx, r11 and, with the result, rax.
var syscallInstruction = []byte{0x0f, 0x05}

// auditArch is AUDIT_ARCH_X86_64, the architecture that a seccomp filter sees.
const auditArch = 0xc000003e

// regs are all general registers. A system call does not change floating point and vector state.
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

// check refuses a 32-bit process: its system calls have other numbers and another calling convention.
func (r *regs) check() error {
	const userCS64 = 0x33 // __USER_CS of arch/x86/include/asm/segment.h
	if r.Cs != userCS64 {
		return fmt.Errorf("it runs 32-bit code: %w", ErrUnsupported)
	}
	return nil
}

// forCall returns registers for a system call: the thread continues at insn, makes the call nr with args, and then
// returns to the address that is stored at sp.
func (r *regs) forCall(insn, sp uint64, nr uintptr, args []uintptr) regs {
	c := *r
	c.Rip, c.Rsp = insn, sp
	c.Rax = uint64(nr)
	for i, reg := range []*uint64{&c.Rdi, &c.Rsi, &c.Rdx, &c.R10, &c.R8, &c.R9}[:len(args)] {
		*reg = uint64(args[i])
	}
	c.forgetCall()
	return c
}

// instruction is the register that says where the thread continues.
func (r *regs) instruction() *uint64 { return &r.Rip }

// forgetCall marks the thread as not in a system call. Otherwise, if rax happened to look like
// -ERESTARTSYS, the kernel would restart a call and move rip back by the length of the instruction.
func (r *regs) forgetCall() { r.Orig_rax = ^uint64(0) }

// eintrCalls are blocking calls that end with EINTR on any interruption, even one without a signal handler,
// such as our stop (signal(7), 'Interruption of system calls and library functions by stop signals').
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

// keepCallGoing makes the kernel repeat one of the eintrCalls that our stop ended with EINTR. It replaces EINTR by
// -ERESTARTNOHAND: if a signal handler runs, the call returns EINTR; otherwise the kernel repeats it. So a signal that
// did arrive still has its effect.
func (r *regs) keepCallGoing() (changed bool) {
	const eRestartNoHand = 514 // include/linux/errno.h
	if !eintrCalls[r.Orig_rax] || int64(r.Rax) != -int64(unix.EINTR) {
		return false
	}
	r.Rax = ^uint64(eRestartNoHand - 1)
	return true
}
