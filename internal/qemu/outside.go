// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// An outside is a kind of device that works in the VM's memory from outside of QEMU: no userfaultfd of QEMU's makes it
// wait for a page that has not come.
type outside struct {
	prefix string // of the type's name
	is     string
	remedy string
}

// The first one that fits counts.
var (
	outsideTypes = []outside{
		{"vfio", "a device of this host (VFIO), whose state migrated cannot move and which has the VM's memory pinned",
			"unplug the device, or start the VM without it"},
		{"vhost-user", "served by another process (vhost-user), which uses the VM's memory: " +
			"nothing makes that wait for pages that have not come",
			"unplug the device, or start the VM with one that QEMU or the kernel serves (virtio-blk, virtio-net with vhost=on, ...)"},
		{"vhost-vdpa", "a device of this host (vDPA), which has the VM's memory pinned", "unplug the device, or start the VM without it"},
		{"ivshmem", "memory that the VM shares with others (ivshmem): what they write would stay on this host",
			"unplug the device, or start the VM without it"},
		{"x-pci-proxy-dev", "served by another process (multi-process QEMU), which uses the VM's memory",
			"start the VM without it"},
	}
	// outsideObjects are among what -object makes; their names say what they are in their middle.
	outsideObjects = []string{"vhost-user-backend", "cryptodev-vhost-user"}
)

func outsideType(typeName string) *outside {
	for i := range outsideTypes {
		if strings.HasPrefix(typeName, outsideTypes[i].prefix) {
			return &outsideTypes[i]
		}
	}
	return nil
}

// checkOutside refuses the VM's devices of these kinds, by their names.
func (vm *VM) checkOutside(ctx context.Context) (results []Result, err error) {
	refuse := func(name string, o *outside) {
		results = append(results, Result{Subject: "devices", Status: Failed, Detail: name + " is " + o.is, Remedy: o.remedy})
	}
	devices, err := vm.userDevices(ctx)
	if err != nil {
		return nil, err
	}
	for _, d := range devices {
		if o := outsideType(d.Class()); o != nil {
			refuse(fmt.Sprintf("%s (%s)", d.path, d.Class()), o)
		}
	}
	objects, err := vm.Children(ctx, "/objects")
	if err != nil {
		return nil, err
	}
	for _, c := range objects {
		if slices.Contains(outsideObjects, c.Class()) {
			refuse(fmt.Sprintf("-object %s,id=%s", c.Class(), c.Name), outsideType("vhost-user"))
		}
	}
	text, err := vm.hmp(ctx, "info network")
	if err != nil {
		return nil, err
	}
	for _, n := range outsideNetdev.FindAllStringSubmatch(text, -1) {
		refuse(fmt.Sprintf("-netdev %s,id=%s", n[2], n[1]), outsideType(n[2]))
	}
	return results, nil
}

// outsideNetdev finds the back ends of network cards in HMP's "info network": "net0: index=0,type=vhost-user,...", after
// a backslash where the card is plugged in (print_net_client in QEMU's net/net.c). No QMP command lists them.
var outsideNetdev = regexp.MustCompile(`(?m)^[ \\]*(.*): index=\d+,type=(vhost-user|vhost-vdpa),`)
