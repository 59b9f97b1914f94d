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

// An outside is a kind of device that accesses the VM's memory from outside of QEMU, where QEMU's userfaultfd does not
// make it wait for a missing page, or that is a device of this host, which another host has not got.
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
		vhostUser,
		{"vhost-vdpa", "a device of this host (vDPA), which has the VM's memory pinned",
			"unplug the device, or start the VM without it"},
		{"ivshmem", "memory that the VM shares with others (ivshmem): what they write would stay on this host",
			"unplug the device, or start the VM without it"},
		{"x-pci-proxy-dev", "served by another process (multi-process QEMU), which uses the VM's memory",
			"start the VM without it"},
		// QEMU does not refuse to move it, and takes it from the guest when it has loaded the VM. A QEMU with the same
		// command line takes another device from its host when it starts.
		{"usb-host", "a USB device of this host: the guest would lose it in the middle of its work",
			"unplug it (QMP device_del); a device of the destination can be plugged in there when the VM has moved"},
		// QEMU moves no more of these than what the guest has sent to them, or nothing.
		{"u2f-", securityKey, unplugKey},
		{"canokey", securityKey, unplugKey},
		{"ccid-card-", "a smart card whose state QEMU does not move",
			"unplug it (QMP device_del), and plug it in at the destination when the VM has moved"},
	}
	vhostUser = outside{"vhost-user", "served by another process (vhost-user), which uses the VM's memory: " +
		"that process does not wait for pages that have not arrived",
		"unplug the device, or start the VM with one that QEMU or the kernel serves " +
			"(virtio-blk, virtio-net with vhost=on, ...)"}
	// redirected is a USB device that usb-redir has from elsewhere. Without one, usb-redir is moved.
	redirected = outside{"", "a USB device that is redirected to this QEMU (usb-redir), and not to the destination's: " +
		"the guest would lose it in the middle of its work",
		"end its redirection, where it comes from; redirect it to the destination when the VM has moved"}
	// outsideObjects are the kinds of -object that are refused, by their full names: "cryptodev-vhost-user" does not
	// begin with "vhost-user".
	outsideObjects = map[string]outside{
		"vhost-user-backend": vhostUser, "cryptodev-vhost-user": vhostUser,
		// A QEMU with the same command line takes the keyboard or mouse from its host when it starts.
		"input-linux": {"", "a keyboard or mouse of this host, which the destination has not got",
			"delete the object (QMP object-del), or start the VM without it"},
		// QEMU has a blocker for some of them, in some versions.
		"sev-guest": confidential, "sev-snp-guest": confidential, "tdx-guest": confidential,
	}
	confidential = outside{"", "memory encryption (SEV, TDX): nobody else can read the VM's memory, nor move it",
		"shut the VM down, and start it at the destination"}
	// outsideDrivers are QEMU's block drivers that give a device, or another process, the VM's memory. Their images look
	// like ones on network storage: "nvme://0000:01:00.0/1".
	outsideDrivers = []string{
		"nvme", "nvme-io_uring", "virtio-blk-vfio-pci", "virtio-blk-vhost-user", "virtio-blk-vhost-vdpa",
	}
	outsideDisk = outside{"", "a disk of this host, or of another process, that uses the VM's memory without QEMU, " +
		"and that the destination has not got",
		"unplug the disk, or start the VM with a disk on network storage"}
)

const (
	securityKey = "a security key, of this host or with its state on this host, which QEMU does not move"
	unplugKey   = "unplug it (QMP device_del); one of the destination's can be plugged in there when the VM has moved"
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
		attached := false
		if d.Class() == "usb-redir" {
			if err := qom.Property(ctx, vm.QMP, d.Path, "attached", &attached); err != nil {
				return nil, err
			}
		}
		if attached {
			refuse(fmt.Sprintf("%s (%s)", d.Path, d.Class()), &redirected)
		}
	}
	objects, err := qom.Children(ctx, vm.QMP, "/objects")
	if err != nil {
		return nil, err
	}
	for _, c := range objects {
		if o, refused := outsideObjects[c.Class()]; refused {
			refuse(fmt.Sprintf("-object %s,id=%s", c.Class(), c.Name), &o)
		}
	}
	text, err := vm.QMP.HMP(ctx, "info network")
	if err != nil {
		return nil, err
	}
	for _, n := range outsideNetdev.FindAllStringSubmatch(text, -1) {
		refuse(fmt.Sprintf("-netdev %s,id=%s", n[2], n[1]), outsideType(n[2]))
	}
	nodes, err := outsideNodes(ctx, vm)
	if err != nil {
		return nil, err
	}
	for _, n := range nodes {
		refuse(n, &outsideDisk)
	}
	tpms, err := tpms(ctx, vm)
	for _, id := range tpms {
		refuse("TPM "+id, &tpm)
	}
	return results, err
}

// outsideNodes describes the VM's block nodes of outsideDrivers, also those that no disk uses yet.
func outsideNodes(ctx context.Context, vm *qemu.VM) (described []string, err error) {
	var nodes []struct {
		Name   string `json:"node-name"`
		Driver string `json:"drv"`
		File   string `json:"file"`
	}
	if err := vm.QMP.Do(ctx, "query-named-block-nodes", map[string]bool{"flat": true}, &nodes); err != nil {
		return nil, err
	}
	for _, n := range nodes {
		if slices.Contains(outsideDrivers, n.Driver) {
			described = append(described, fmt.Sprintf("block node %s (%s, driver %s)", n.Name, n.File, n.Driver))
		}
	}
	return described, nil
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
