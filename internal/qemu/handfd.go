// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"os"
)

// handedName is under what name QEMU keeps a handed descriptor.
const handedName = "migrated-handed"

// HandFD gives QEMU a duplicate of f, which stays the caller's. release makes QEMU close it.
//
// It uses getfd and closefd. add-fd's counterpart remove-fd closes nothing as long as the VM does not run
// (monitor_fdset_cleanup in monitor/misc.c), and a VM that is to come does not.
func (vm *VM) HandFD(ctx context.Context, f *os.File) (release func(context.Context) error, err error) {
	name := map[string]string{"fdname": handedName}
	if err := vm.QMP.DoWithFD(ctx, "getfd", name, nil, f); err != nil {
		return nil, err
	}
	return func(ctx context.Context) error { return vm.QMP.Do(ctx, "closefd", name, nil) }, nil
}
