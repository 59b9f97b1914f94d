// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"fmt"
	"regexp"
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
	// Users make devices, so they are children of these two.
	for _, parent := range []string{"/machine/peripheral", "/machine/peripheral-anon"} {
		children, err := vm.children(ctx, parent)
		if err != nil {
			return nil, err
		}
		for _, c := range children {
			if o := outsideType(c.kind); o != nil {
				refuse(fmt.Sprintf("%s/%s (%s)", parent, c.name, c.kind), o)
			}
		}
	}
	objects, err := vm.children(ctx, "/objects")
	if err != nil {
		return nil, err
	}
	for _, c := range objects {
		for _, kind := range outsideObjects {
			if c.kind == kind {
				refuse(fmt.Sprintf("-object %s,id=%s", c.kind, c.name), outsideType("vhost-user"))
			}
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

// A qomChild is a child of a QOM object: its name and what type it is of.
type qomChild struct{ name, kind string }

func (vm *VM) children(ctx context.Context, path string) (children []qomChild, err error) {
	var properties []struct {
		Name string `json:"name"`
		Type string `json:"type"`
	}
	if err := vm.QMP.Do(ctx, "qom-list", map[string]string{"path": path}, &properties); err != nil {
		return nil, err
	}
	for _, p := range properties {
		if kind, found := strings.CutPrefix(p.Type, "child<"); found {
			children = append(children, qomChild{p.Name, strings.TrimSuffix(kind, ">")})
		}
	}
	return children, nil
}
