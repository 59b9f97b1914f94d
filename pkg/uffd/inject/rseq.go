// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"encoding/binary"
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// rseqState is the thread's announcement that it is inside a restartable sequence (rseq(2), used by per-CPU
// allocators): the address of a descriptor saying which instructions must not be interrupted. The kernel clears
// it when the thread returns to user space outside those instructions, as ours does in the vDSO; then the
// sequence would be continued as if it had not been interrupted. Put back, the kernel finds it at the next
// return and aborts the sequence as it should.
type rseqState struct {
	addr    uint64 // of the field rseq_cs in the target; 0: the thread has not registered rseq
	pointer uint64
}

func readRseq(tid int) (rseqState, error) {
	var conf struct { // struct ptrace_rseq_configuration of linux/ptrace.h
		pointer               uint64
		size, signature, flag uint32
		_                     uint32
	}
	err := ptraceAt(unix.PTRACE_GET_RSEQ_CONFIGURATION, tid, unsafe.Sizeof(conf), unsafe.Pointer(&conf))
	if errors.Is(err, unix.EIO) || errors.Is(err, unix.EINVAL) {
		return rseqState{}, nil // Linux < 5.13 cannot tell
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

func (s rseqState) restore(tid int) error {
	if s.pointer == 0 {
		return nil // nobody sets it but the thread itself
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
