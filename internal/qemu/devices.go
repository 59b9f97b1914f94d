// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"slices"
)

// UserDevices are the devices that a user has given the VM, on the command line or since, each as its path in QEMU's
// tree of objects and its type.
func (vm *VM) UserDevices(ctx context.Context) (devices []string, err error) {
	for _, parent := range []string{"/machine/peripheral", "/machine/peripheral-anon"} {
		var children []struct {
			Name string `json:"name"`
			Type string `json:"type"`
		}
		if err := vm.QMP.Do(ctx, "qom-list", map[string]string{"path": parent}, &children); err != nil {
			return nil, err
		}
		for _, c := range children {
			devices = append(devices, parent+"/"+c.Name+" "+c.Type)
		}
	}
	slices.Sort(devices)
	return devices, nil
}
