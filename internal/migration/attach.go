// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"

	"github.com/migrated-vm/migrated/internal/qemu"
)

// attachSame connects to the QEMU of before once more, whose monitor at path was lost: another QEMU there is an error.
// The caller closes it.
func attachSame(ctx context.Context, path string, before *qemu.VM) (*qemu.VM, error) {
	ctx, cancel := context.WithTimeout(ctx, attachTimeout)
	defer cancel()
	vm, err := qemu.Attach(ctx, path)
	if err != nil {
		return nil, err
	}
	if vm.Pid != before.Pid {
		return nil, errors.Join(fmt.Errorf("%s is another QEMU's by now, process %d", path, vm.Pid), vm.Close())
	}
	return vm, nil
}
