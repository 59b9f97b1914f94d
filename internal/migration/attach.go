// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"

	"github.com/migrated-vm/migrated/internal/qemu"
)

// attachSame connects again to the QEMU of before, whose monitor at path was lost. It fails if another QEMU answers
// there. The caller closes the result.
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
