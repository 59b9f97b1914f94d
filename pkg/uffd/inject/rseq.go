// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"encoding/binary"
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// rseqState is the field rseq_cs by which a thread says that it is inside a restartable sequence (rseq(2), used by
// per-CPU allocators). The field points to a descriptor of the instructions that must not be interrupted. The kernel
// clears the field when the thread returns to user space outside those instructions, as it does for our call. Without
// the field, the sequence would continue as if it had not been interrupted. If the field is put back, the kernel sees
// it at the next return and aborts the sequence, as it should.
type rseqState struct {
	addr    uint64 // address of the field rseq_cs in the target; 0 if the thread has not registered rseq
	pointer uint64 // content of the field
}

func readRseq(tid int) (rseqState, error) {
	var conf struct { // struct ptrace_rseq_configuration of linux/ptrace.h
		pointer               uint64
		size, signature, flag uint32
		_                     uint32
	}
	err := ptraceAt(unix.PTRACE_GET_RSEQ_CONFIGURATION, tid, unsafe.Sizeof(conf), unsafe.Pointer(&conf))
	if errors.Is(err, unix.EIO) || errors.Is(err, unix.EINVAL) {
		return rseqState{}, nil // Linux before 5.13 does not have the request
	}
	if err != nil || conf.pointer == 0 {
		return rseqState{}, err
	}
	const offsetOfCS = 8 // struct rseq of linux/rseq.h: cpu_id_start, cpu_id, rseq_cs
	state := rseqState{addr: conf.pointer + offsetOfCS}
	state.pointer, err = peek(tid, state.addr)
	if err != nil {
		return rseqState{}, fmt.Errorf("restartable sequence at %#x: %w", state.addr, err)
	}
	return state, nil
}

// abort sets the next instruction in r to the sequence's abort address, if r is inside the sequence. The kernel does
// that itself, but not for a thread that restores itself by rt_sigreturn(2).
func (s rseqState) abort(tid int, r *regs) error {
	if s.pointer == 0 {
		return nil
	}
	const startAt, lengthAt, abortAt = 8, 16, 24 // struct rseq_cs of linux/rseq.h
	var descriptor [32]byte
	if _, err := unix.PtracePeekData(tid, uintptr(s.pointer), descriptor[:]); err != nil {
		return fmt.Errorf("restartable sequence at %#x: %w", s.pointer, err)
	}
	start := binary.NativeEndian.Uint64(descriptor[startAt:])
	if at := r.instruction(); *at-start < binary.NativeEndian.Uint64(descriptor[lengthAt:]) {
		*at = binary.NativeEndian.Uint64(descriptor[abortAt:])
	}
	return nil
}

func (s rseqState) restore(tid int) error {
	if s.pointer == 0 {
		return nil // the field was 0, and only the thread itself sets it
	}
	return ptrace(unix.PTRACE_POKEDATA, tid, uintptr(s.addr), uintptr(s.pointer))
}

func peek(tid int, addr uint64) (uint64, error) {
	var word [8]byte
	if _, err := unix.PtracePeekData(tid, uintptr(addr), word[:]); err != nil {
		return 0, err
	}
	return binary.NativeEndian.Uint64(word[:]), nil
}
