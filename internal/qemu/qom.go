// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"slices"
	"strings"
)

// Where QEMU's tree of objects (QOM) has the devices that a user has given to the VM: those with an id, and those without.
const (
	NamedDevices   = "/machine/peripheral"
	UnnamedDevices = "/machine/peripheral-anon"
)

// A Child is a child of an object.
type Child struct {
	Name string `json:"name"`
	Type string `json:"type"` // "child<virtio-blk-pci>"
}

// Class is the type of the child itself: "virtio-blk-pci".
func (c Child) Class() string { return strings.TrimSuffix(strings.TrimPrefix(c.Type, childOf), ">") }

const childOf = "child<"

// Children are those of the object at that path.
func (vm *VM) Children(ctx context.Context, path string) (children []Child, err error) {
	if err := vm.QMP.Do(ctx, "qom-list", map[string]string{"path": path}, &children); err != nil {
		return nil, err
	}
	return slices.DeleteFunc(children, func(c Child) bool { return !strings.HasPrefix(c.Type, childOf) }), nil
}

// A userDevice is a device that a user has given to the VM.
type userDevice struct {
	Child
	path string
}

func (vm *VM) userDevices(ctx context.Context) (devices []userDevice, err error) {
	for _, parent := range []string{NamedDevices, UnnamedDevices} {
		children, err := vm.Children(ctx, parent)
		if err != nil {
			return nil, err
		}
		for _, c := range children {
			devices = append(devices, userDevice{c, parent + "/" + c.Name})
		}
	}
	return devices, nil
}

// UserDevices are the devices that a user has given the VM, on the command line or since, each as its path in QEMU's
// tree of objects and its type.
func (vm *VM) UserDevices(ctx context.Context) (devices []string, err error) {
	all, err := vm.userDevices(ctx)
	for _, d := range all {
		devices = append(devices, d.path+" "+d.Type)
	}
	slices.Sort(devices)
	return devices, err
}
