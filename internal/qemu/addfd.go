// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

const handedName = "migrated-handed"

// AddFD gives QEMU a duplicate of f and returns which number it has there. release makes QEMU close it.
//
// It uses getfd and closefd, and finds the number in /proc. add-fd would tell the number, but its
// counterpart remove-fd closes nothing as long as the VM does not run (monitor_fdset_cleanup in
// monitor/misc.c), and a VM that is to come does not.
func (vm *VM) AddFD(ctx context.Context, f *os.File) (number int, release func(context.Context) error, err error) {
	file, err := statFile(f)
	if err != nil {
		return 0, nil, err
	}
	before, err := vm.descriptorsOf(file)
	if err != nil {
		return 0, nil, err
	}
	name := map[string]string{"fdname": handedName}
	if err := vm.QMP.DoWithFD(ctx, "getfd", name, nil, f); err != nil {
		return 0, nil, err
	}
	release = func(ctx context.Context) error { return vm.QMP.Do(ctx, "closefd", name, nil) }
	after, err := vm.descriptorsOf(file)
	if err != nil {
		return 0, nil, errors.Join(err, release(ctx))
	}
	for n := range after {
		if !before[n] {
			return n, release, nil
		}
	}
	return 0, nil, errors.Join(
		fmt.Errorf("QEMU, process %d, took %s and does not have it: is this the process behind its QMP socket?", vm.Pid, f.Name()),
		release(ctx))
}

func statFile(f *os.File) (unix.Stat_t, error) {
	var st unix.Stat_t
	raw, err := f.SyscallConn()
	if err != nil {
		return st, err
	}
	var statErr error
	err = raw.Control(func(fd uintptr) { statErr = unix.Fstat(int(fd), &st) })
	return st, errors.Join(err, statErr)
}

// descriptorsOf returns which of QEMU's descriptors are of the given file.
func (vm *VM) descriptorsOf(file unix.Stat_t) (map[int]bool, error) {
	dir := fmt.Sprintf("/proc/%d/fd", vm.Pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("descriptors of QEMU: %w", err)
	}
	found := make(map[int]bool)
	for _, e := range entries {
		n, err := strconv.Atoi(e.Name())
		var st unix.Stat_t
		if err != nil || unix.Stat(dir+"/"+e.Name(), &st) != nil {
			continue // closed meanwhile
		}
		if st.Dev == file.Dev && st.Ino == file.Ino {
			found[n] = true
		}
	}
	return found, nil
}
