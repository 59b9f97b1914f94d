// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"encoding/binary"
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Every C library contains these instructions, for system calls and for the return from signal handlers.
var (
	callInstructions   = [][]byte{{0x0f, 0x05, 0xc3}} // syscall; ret
	returnInstructions = [][]byte{
		{0x48, 0xc7, 0xc0, unix.SYS_RT_SIGRETURN, 0, 0, 0, 0x0f, 0x05}, // mov $15, %rax; syscall
		{0xb8, unix.SYS_RT_SIGRETURN, 0, 0, 0, 0x0f, 0x05},             // mov $15, %eax; syscall
	}
)

// Offsets in bytes of what rt_sigreturn(2) reads from struct rt_sigframe (arch/x86/include/asm/sigframe.h). The first
// word is the address of the code that calls rt_sigreturn(2): `ret` jumps there.
const (
	frameFlags   = 8  // ucontext.uc_flags
	frameAltMode = 32 // uc_stack.ss_flags
	frameRegs    = 48 // uc_mcontext: the registers in the order of struct sigcontext_64
	frameFPState = frameRegs + 184
	frameMask    = frameRegs + 256 // uc_sigmask
	frameSize    = frameMask + 8 + 128

	redZone = 128 // bytes below the stack pointer that the ABI lets a function use
)

// ucFlags say that there is an xsave area, and that ss is to be restored exactly
// (arch/x86/include/uapi/asm/ucontext.h).
const ucFlags = 1 | 2 | 4

// frame makes the signal frame from which rt_sigreturn(2) restores a thread: registers r, signal mask mask and vector
// state xstate. returns is the address of the code that calls rt_sigreturn(2). image belongs on the stack at sp, where
// the kernel would put it for a signal.
func (r *regs) frame(returns uint64, mask sigset, xstate []byte) (sp uint64, image []byte) {
	state := signalState(xstate)
	stateAt := (r.Rsp - redZone - uint64(len(state))) &^ 63 // XRSTOR requires this alignment
	sp = (stateAt - frameSize) &^ 15
	image = make([]byte, stateAt-sp+uint64(len(state)))
	put := func(at int, words ...uint64) {
		for i, w := range words {
			binary.LittleEndian.PutUint64(image[at+8*i:], w)
		}
	}
	put(0, returns)
	put(frameFlags, ucFlags)
	put(frameAltMode, 0xff) // no valid mode: the alternate signal stack stays as it is
	put(frameRegs, r.R8, r.R9, r.R10, r.R11, r.R12, r.R13, r.R14, r.R15, r.Rdi, r.Rsi, r.Rbp, r.Rbx, r.Rdx, r.Rax, r.Rcx,
		r.Rsp, r.Rip, r.Eflags, r.Cs&0xffff|r.Ss<<48)
	put(frameFPState, stateAt)
	put(frameMask, uint64(mask))
	copy(image[stateAt-sp:], state)
	return sp, image
}

// withoutCall returns the registers for a frame, if the thread was interrupted in a system call. The kernel does not
// restart that call after rt_sigreturn(2), so these registers do. Waits that count the time left (nanosleep, poll with
// a timeout) end with EINTR instead, because the kernel forgets how much time was left.
func (r regs) withoutCall() regs {
	const restartSys, restartNoIntr, restartNoHand, restartBlock = -512, -513, -514, -516 // include/linux/errno.h
	if int64(r.Orig_rax) < 0 {
		return r
	}
	switch int64(r.Rax) {
	case restartSys, restartNoIntr, restartNoHand:
		r.Rax = r.Orig_rax
		r.Rip -= uint64(len(syscallInstruction))
	case restartBlock:
		errno := -int64(unix.EINTR)
		r.Rax = uint64(errno)
	}
	return r
}

// Offsets in bytes in an xsave area of the standard format, and the bits of its components (Intel's manual, volume 1,
// 13.4).
const (
	stateSoftware = 464 // for software: struct _fpx_sw_bytes of arch/x86/include/uapi/asm/sigcontext.h
	stateHeader   = 512 // bits of the components that are not in their initial state
	stateTiles    = 2816

	legacy   = 1<<0 | 1<<1 // x87 and SSE
	tileData = 1 << 18
)

// signalState converts an xsave area from ptrace(2) to the form that rt_sigreturn(2) requires: it contains its size,
// and a magic number after it says that it is complete.
func signalState(xstate []byte) []byte {
	const magic1, magic2 = 0x46505853, 0x46505845
	inUse := binary.LittleEndian.Uint64(xstate[stateHeader:])
	size := len(xstate)
	if inUse&tileData == 0 { // the kernel refuses room for tiles if the thread was never permitted to use them
		size = min(size, stateTiles)
	}
	state := make([]byte, size, size+4)
	copy(state, xstate)
	software := state[stateSoftware:stateHeader]
	clear(software)
	binary.LittleEndian.PutUint32(software, magic1)
	binary.LittleEndian.PutUint32(software[4:], uint32(size+4))
	binary.LittleEndian.PutUint64(software[8:], inUse|legacy)
	binary.LittleEndian.PutUint32(software[16:], uint32(size))
	return binary.LittleEndian.AppendUint32(state, magic2)
}

// getXstate reads the floating point and vector state.
func getXstate(tid int) ([]byte, error) {
	const ntX86Xstate = 0x202
	buffer := make([]byte, 16<<10)
	vector := unix.Iovec{Base: &buffer[0], Len: uint64(len(buffer))}
	if err := ptraceAt(unix.PTRACE_GETREGSET, tid, ntX86Xstate, unsafe.Pointer(&vector)); err != nil {
		return nil, fmt.Errorf("vector registers: %w", err)
	}
	if vector.Len < stateHeader+64 || vector.Len == uint64(len(buffer)) {
		return nil, errors.New("vector registers: their size is not one that this program knows")
	}
	return buffer[:vector.Len], nil
}
