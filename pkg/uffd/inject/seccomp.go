// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"encoding/binary"
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// wouldKill reports whether a seccomp filter of the thread would kill it for the call. It reads the filters
// with ptrace and runs them here: a real attempt would kill the VM.
//
// Reading filters needs CAP_SYS_ADMIN and CONFIG_CHECKPOINT_RESTORE. Without them the answer is false.
// QEMU's own -sandbox denies nothing that Take injects.
func wouldKill(tid int, insn uint64, nr uintptr, args []uintptr) (bool, error) {
	const filterMode = 2 // SECCOMP_MODE_FILTER
	if st, err := readStatus(tid); err != nil || st.seccomp != filterMode {
		return false, err
	}
	data := seccompData(insn, nr, args)
	for index := uintptr(0); ; index++ {
		filter, err := seccompFilter(tid, index)
		switch {
		case errors.Is(err, unix.ENOENT): // no more of them
			return false, nil
		case errors.Is(err, unix.EACCES), errors.Is(err, unix.EIO), errors.Is(err, unix.EINVAL):
			return false, nil // not permitted, or not built into the kernel
		case err != nil:
			return false, err
		}
		program, _ := bpf.Disassemble(filter)
		vm, err := bpf.NewVM(program)
		if err != nil {
			return false, fmt.Errorf("seccomp filter %d of thread %d: %w", index, tid, err)
		}
		verdict, err := vm.Run(data)
		if err != nil {
			return false, fmt.Errorf("seccomp filter %d of thread %d: %w", index, tid, err)
		}
		// The strictest answer of all filters decides, and these two are the strictest.
		switch uint32(verdict) & unix.SECCOMP_RET_ACTION_FULL {
		case unix.SECCOMP_RET_KILL_PROCESS, unix.SECCOMP_RET_KILL_THREAD:
			return true, nil
		}
	}
}

// seccompData is struct seccomp_data as a filter sees it. Filters read it in words of 32 bits in the machine's
// byte order. The virtual machine of package bpf reads words in network order, so each word is stored in that order.
func seccompData(insn uint64, nr uintptr, args []uintptr) []byte {
	long := func(v uint64) []uint32 {
		native := binary.NativeEndian.AppendUint64(nil, v)
		return []uint32{binary.NativeEndian.Uint32(native), binary.NativeEndian.Uint32(native[4:])}
	}
	words := []uint32{uint32(nr), auditArch}
	words = append(words, long(insn+uint64(len(syscallInstruction)))...)
	for i := range 6 {
		arg := uint64(0)
		if i < len(args) {
			arg = uint64(args[i])
		}
		words = append(words, long(arg)...)
	}
	var data []byte
	for _, word := range words {
		data = binary.BigEndian.AppendUint32(data, word)
	}
	return data
}

// seccompFilter reads the filter with that index; 0 is the filter installed last. The error is ENOENT if there are
// fewer.
func seccompFilter(tid int, index uintptr) ([]bpf.RawInstruction, error) {
	n, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SECCOMP_GET_FILTER, uintptr(tid), index, 0, 0, 0)
	if errno != 0 {
		return nil, errno
	}
	raw := make([]unix.SockFilter, max(n, 1))
	if err := ptraceAt(unix.PTRACE_SECCOMP_GET_FILTER, tid, index, unsafe.Pointer(&raw[0])); err != nil {
		return nil, err
	}
	filter := make([]bpf.RawInstruction, n)
	for i, in := range raw[:n] {
		filter[i] = bpf.RawInstruction{Op: in.Code, Jt: in.Jt, Jf: in.Jf, K: in.K}
	}
	return filter, nil
}
