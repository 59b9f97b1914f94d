// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// handedName is the name under which QEMU keeps the descriptor of HandFD.
const handedName = "migrated-handed"

// HandFD gives QEMU a duplicate of f. f stays the caller's. release makes QEMU close its duplicate.
//
// HandFD uses getfd and closefd. add-fd does not fit: its counterpart remove-fd closes nothing while the VM does not
// run (monitor_fdset_cleanup in monitor/misc.c), and a VM that has not arrived yet does not run.
func (vm *VM) HandFD(ctx context.Context, f *os.File) (release func(context.Context) error, err error) {
	if err := vm.getFD(ctx, handedName, f); err != nil {
		return nil, err
	}
	return func(ctx context.Context) error { return vm.closeFD(ctx, handedName) }, nil
}

// getFD gives QEMU a duplicate of f under a name. QEMU keeps it until closeFD, or until a command uses it up.
func (vm *VM) getFD(ctx context.Context, name string, f *os.File) error {
	return vm.QMP.DoWithFD(ctx, "getfd", map[string]string{"fdname": name}, nil, f)
}

func (vm *VM) closeFD(ctx context.Context, name string) error {
	return vm.QMP.Do(ctx, "closefd", map[string]string{"fdname": name}, nil)
}

// addFD gives QEMU a duplicate of f and returns the number of its descriptor set. QEMU opens it as the file
// fdsetPath(set), in the mode in which f is open (monitor_fdset_dup_fd_add in monitor/fds.c).
func (vm *VM) addFD(ctx context.Context, f *os.File) (set int, err error) {
	var added struct {
		Set int `json:"fdset-id"`
	}
	err = vm.QMP.DoWithFD(ctx, "add-fd", nil, &added, f)
	return added.Set, err
}

// removeFD makes QEMU close a set from addFD. While the VM does not run, QEMU closes it only when the VM runs again.
func (vm *VM) removeFD(ctx context.Context, set int) error {
	return vm.QMP.Do(ctx, "remove-fd", map[string]int{"fdset-id": set}, nil)
}

func fdsetPath(set int) string { return fmt.Sprintf("/dev/fdset/%d", set) }

// memoryFile returns a new file in memory (memfd_create(2)) and a second open file of the same content. The second one
// has its own mode and its own locks. The caller closes both.
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
