// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/migrated-vm/migrated/internal/qmp"
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
	tpms, err := vm.tpms(ctx)
	for _, id := range tpms {
		refuse("TPM "+id, &tpm)
	}
	return results, err
}

// tpm is what a VM's TPM is: swtpm has its state in files, QEMU in a copy that moves with its devices, and both hosts'
// would write to the files where these are shared.
var tpm = outside{"", "another process's (swtpm) or a device of this host, which has a state of its own: " +
	"how that is to follow was not tried",
	"start the VM without it, or move it with virsh migrate"}

// tpms are the names of the VM's TPMs. No QOM type tells what is behind them.
func (vm *VM) tpms(ctx context.Context) (ids []string, err error) {
	var found []struct {
		ID string `json:"id"`
	}
	err = vm.QMP.Do(ctx, "query-tpm", nil, &found)
	if errors.Is(err, qmp.ErrCommandNotFound) { // QEMU was built without them
		return nil, nil
	}
	for _, t := range found {
		ids = append(ids, t.ID)
	}
	return ids, err
}

// outsideNetdev finds the back ends of network cards in HMP's "info network": "net0: index=0,type=vhost-user,...", after
// a backslash where the card is plugged in (print_net_client in QEMU's net/net.c). No QMP command lists them.
var outsideNetdev = regexp.MustCompile(`(?m)^[ \\]*(.*): index=\d+,type=(vhost-user|vhost-vdpa),`)
