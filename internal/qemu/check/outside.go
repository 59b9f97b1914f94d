// SPDX-License-Identifier: Apache-2.0

package check

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/qom"
	"github.com/migrated-vm/migrated/internal/qmp"
)

// An outside is a kind of device that accesses the VM's memory from outside of QEMU. QEMU's userfaultfd does not make
// such a device wait for a missing page.
type outside struct {
	prefix string // of the type's name
	is     string
	remedy string
}

// The kinds of devices that are refused. The first entry of outsideTypes that matches counts.
var (
	outsideTypes = []outside{
		{"vfio", "a device of this host (VFIO), whose state migrated cannot move and which has the VM's memory pinned",
			"unplug the device, or start the VM without it"},
		{"vhost-user", "served by another process (vhost-user), which uses the VM's memory: " +
			"that process does not wait for pages that have not arrived",
			"unplug the device, or start the VM with one that QEMU or the kernel serves " +
				"(virtio-blk, virtio-net with vhost=on, ...)"},
		{"vhost-vdpa", "a device of this host (vDPA), which has the VM's memory pinned",
			"unplug the device, or start the VM without it"},
		{"ivshmem", "memory that the VM shares with others (ivshmem): what they write would stay on this host",
			"unplug the device, or start the VM without it"},
		{"x-pci-proxy-dev", "served by another process (multi-process QEMU), which uses the VM's memory",
			"start the VM without it"},
	}
	// outsideObjects are the types of -object that another process serves. They are listed by their full names, because
	// "cryptodev-vhost-user" does not begin with "vhost-user".
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

// checkOutside refuses the VM's devices of these kinds, by the names of their types.
func checkOutside(ctx context.Context, vm *qemu.VM) (results []Result, err error) {
	refuse := func(name string, o *outside) {
		results = append(results, Result{Subject: "devices", Status: Failed, Detail: name + " is " + o.is, Remedy: o.remedy})
	}
	devices, err := qom.Devices(ctx, vm.QMP)
	if err != nil {
		return nil, err
	}
	for _, d := range devices {
		if o := outsideType(d.Class()); o != nil {
			refuse(fmt.Sprintf("%s (%s)", d.Path, d.Class()), o)
		}
	}
	objects, err := qom.Children(ctx, vm.QMP, "/objects")
	if err != nil {
		return nil, err
	}
	for _, c := range objects {
		if slices.Contains(outsideObjects, c.Class()) {
			refuse(fmt.Sprintf("-object %s,id=%s", c.Class(), c.Name), outsideType("vhost-user"))
		}
	}
	text, err := vm.QMP.HMP(ctx, "info network")
	if err != nil {
		return nil, err
	}
	for _, n := range outsideNetdev.FindAllStringSubmatch(text, -1) {
		refuse(fmt.Sprintf("-netdev %s,id=%s", n[2], n[1]), outsideType(n[2]))
	}
	tpms, err := tpms(ctx, vm)
	for _, id := range tpms {
		refuse("TPM "+id, &tpm)
	}
	return results, err
}

// tpm describes any TPM of a VM. swtpm keeps its state in files, and QEMU moves a copy of that state with its devices.
// If both hosts share the files, both swtpms would write to them.
var tpm = outside{"", "emulated by another process (swtpm) or a device of this host, which holds its state; " +
	"migrated cannot move that",
	"start the VM without it, or move it with virsh migrate"}

// tpms returns the ids of the VM's TPMs. Their QOM type does not show which back end they have.
func tpms(ctx context.Context, vm *qemu.VM) (ids []string, err error) {
	var found []struct {
		ID string `json:"id"`
	}
	err = vm.QMP.Do(ctx, "query-tpm", nil, &found)
	if errors.Is(err, qmp.ErrCommandNotFound) { // QEMU was built without TPM support
		return nil, nil
	}
	for _, t := range found {
		ids = append(ids, t.ID)
	}
	return ids, err
}

// outsideNetdev matches back ends of network cards in HMP's "info network": "net0: index=0,type=vhost-user,...". A
// backslash precedes the line if the card is plugged in (print_net_client in QEMU's net/net.c). No QMP command lists
// them.
var outsideNetdev = regexp.MustCompile(`(?m)^[ \\]*(.*): index=\d+,type=(vhost-user|vhost-vdpa),`)
