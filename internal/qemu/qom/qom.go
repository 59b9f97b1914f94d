// SPDX-License-Identifier: Apache-2.0

// Package qom reads QEMU's object tree (QOM, the QEMU Object Model) over QMP: the devices that the user added to a VM,
// and properties of objects. internal/qemu/ram finds the users of a memory backend with it, internal/qemu/check finds
// devices that cannot be moved, and internal/machine compares what two VMs must have in common.
package qom

import (
	"context"
	"slices"
	"strings"

	"github.com/migrated-vm/migrated/internal/qmp"
)

// Paths of the devices that the user added to the VM, on the command line or later: with an id, and without.
const (
	NamedDevices   = "/machine/peripheral"
	UnnamedDevices = "/machine/peripheral-anon"
)

// A Child is a child of an object.
type Child struct {
	Name string `json:"name"`
	Type string `json:"type"` // "child<virtio-blk-pci>"
}

// Class returns the type of the child itself, such as "virtio-blk-pci".
func (c Child) Class() string { return strings.TrimSuffix(strings.TrimPrefix(c.Type, childOf), ">") }

const childOf = "child<"

// Children returns the children of the object at path. Links and other properties are left out.
func Children(ctx context.Context, client *qmp.Client, path string) (children []Child, err error) {
	if err := client.Do(ctx, "qom-list", map[string]string{"path": path}, &children); err != nil {
		return nil, err
	}
	return slices.DeleteFunc(children, func(c Child) bool { return !strings.HasPrefix(c.Type, childOf) }), nil
}

// A Device is a device that the user added to the VM.
type Device struct {
	Child
	Path string
}

// Devices returns all devices that the user added to the VM.
func Devices(ctx context.Context, client *qmp.Client) (devices []Device, err error) {
	for _, parent := range []string{NamedDevices, UnnamedDevices} {
		children, err := Children(ctx, client, parent)
		if err != nil {
			return nil, err
		}
		for _, c := range children {
			devices = append(devices, Device{c, parent + "/" + c.Name})
		}
	}
	return devices, nil
}

// Property reads a property of an object into value. If the property does not exist, the error is a qmp.ErrGeneric.
func Property(ctx context.Context, client *qmp.Client, path, name string, value any) error {
	return client.Do(ctx, "qom-get", map[string]string{"path": path, "property": name}, value)
}
