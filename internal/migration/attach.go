// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/process"
)

// errOtherQEMU says that another QEMU answers at a monitor's path.
var errOtherQEMU = errors.New("another QEMU answers")

// attachSame connects to the QEMU with that identity, whose monitor is at path. It fails if another QEMU answers there,
// and touches that one in no other way. The caller closes the result.
func attachSame(ctx context.Context, path string, want process.Identity) (*qemu.VM, error) {
	ctx, cancel := context.WithTimeout(ctx, attachTimeout)
	defer cancel()
	vm, err := qemu.Attach(ctx, path)
	if err != nil {
		return nil, err
	}
	identity, err := vm.Identity()
	if err == nil && identity != want {
		err = fmt.Errorf("%w at %s by now: process %d", errOtherQEMU, path, vm.Pid)
	}
	if err != nil {
		return nil, errors.Join(err, vm.Close())
	}
	return vm, nil
}

// attachAgain connects again to the QEMU of before, whose connection was lost.
func attachAgain(ctx context.Context, path string, before *qemu.VM) (*qemu.VM, error) {
	identity, err := before.Identity()
	if err != nil {
		return nil, err
	}
	return attachSame(ctx, path, identity)
}
