// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"slices"

	"github.com/migrated-vm/migrated/internal/qemu/qom"
)

// UserDevices returns the devices that the user added to the VM, on the command line or later. Each entry is the
// device's path in QEMU's object tree, a space and its type. The list is sorted.
func (vm *VM) UserDevices(ctx context.Context) (devices []string, err error) {
	all, err := qom.Devices(ctx, vm.QMP)
	for _, d := range all {
		devices = append(devices, d.Path+" "+d.Type)
	}
	slices.Sort(devices)
	return devices, err
}
