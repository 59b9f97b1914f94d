// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// handedName is under what name QEMU keeps a handed descriptor.
const handedName = "migrated-handed"

// HandFD gives QEMU a duplicate of f, which stays the caller's. release makes QEMU close it.
//
// It uses getfd and closefd. add-fd's counterpart remove-fd closes nothing as long as the VM does not run
// (monitor_fdset_cleanup in monitor/misc.c), and a VM that is to come does not.
func (vm *VM) HandFD(ctx context.Context, f *os.File) (release func(context.Context) error, err error) {
	if err := vm.getFD(ctx, handedName, f); err != nil {
		return nil, err
	}
	return func(ctx context.Context) error { return vm.closeFD(ctx, handedName) }, nil
}

// getFD gives QEMU a duplicate of f under a name, until closeFD, or a command that uses it up.
func (vm *VM) getFD(ctx context.Context, name string, f *os.File) error {
	return vm.QMP.DoWithFD(ctx, "getfd", map[string]string{"fdname": name}, nil, f)
}

func (vm *VM) closeFD(ctx context.Context, name string) error {
	return vm.QMP.Do(ctx, "closefd", map[string]string{"fdname": name}, nil)
}

// addFD gives QEMU a duplicate of f that it opens as the file fdsetPath(set), which takes the mode that f has
// (monitor_fdset_dup_fd_add in monitor/fds.c).
func (vm *VM) addFD(ctx context.Context, f *os.File) (set int, err error) {
	var added struct {
		Set int `json:"fdset-id"`
	}
	err = vm.QMP.DoWithFD(ctx, "add-fd", nil, &added, f)
	return added.Set, err
}

// removeFD has QEMU close it, now or, where the VM does not run, when that does.
func (vm *VM) removeFD(ctx context.Context, set int) error {
	return vm.QMP.Do(ctx, "remove-fd", map[string]int{"fdset-id": set}, nil)
}

func fdsetPath(set int) string { return fmt.Sprintf("/dev/fdset/%d", set) }

// memoryFile is a file in memory, as memfd_create(2) makes it, and the same opened once more: with another mode, and
// with locks of its own.
func memoryFile(name string, mode int) (file, again *os.File, err error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, nil, err
	}
	file = os.NewFile(uintptr(fd), name)
	if again, err = os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", fd), mode, 0); err != nil {
		return nil, nil, errors.Join(err, file.Close())
	}
	return file, again, nil
}
