// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
)

// DisksActive reports whether QEMU holds the VM's disks. It does not after Saver.Save gave them up, nor while the
// source still has them (late-block-activate). For a VM without disks it returns true.
func (vm *VM) DisksActive(ctx context.Context) (bool, error) {
	nodes, err := vm.blockNodes(ctx)
	if err != nil {
		return false, err
	}
	if len(nodes) == 0 || nodes[0].Active == nil {
		return vm.disksPermitted(ctx)
	}
	return !slices.ContainsFunc(nodes, func(n blockNode) bool { return n.Active != nil && !*n.Active }), nil
}

// ErrDisksKept means that QEMU still has disks that it should have given up.
var ErrDisksKept = errors.New("QEMU has not given all disks up")

// CheckDisksGivenUp returns ErrDisksKept if QEMU says that a block node is active. The answer to Saver.Save does not
// say it: since QEMU 10.0 that command succeeds also where a disk cannot be given up (qmp_xen_save_devices_state drops
// what migration_block_inactivate returns). QEMU before 10.0 does not say which nodes are active, but there Saver.Save
// fails. So it is not asked: the VM stands still.
func (vm *VM) CheckDisksGivenUp(ctx context.Context) error {
	if !vm.saysActive() {
		return nil
	}
	nodes, err := vm.blockNodes(ctx)
	if err != nil {
		return err
	}
	for _, n := range nodes {
		if n.Active != nil && *n.Active {
			return fmt.Errorf("%w: block node %q is active", ErrDisksKept, n.Name)
		}
	}
	return nil
}

// saysActive reports whether QEMU says which block nodes are active, and lets them be activated (QEMU 10.0).
func (vm *VM) saysActive() bool { return vm.QMP.Version().Major >= 10 }

// A blockNode has the used fields of BlockDeviceInfo (qapi/block-core.json).
type blockNode struct {
	Name   string `json:"node-name"`
	Active *bool  `json:"active"` // since QEMU 10.0
}

func (vm *VM) blockNodes(ctx context.Context) (nodes []blockNode, err error) {
	err = vm.QMP.Do(ctx, "query-named-block-nodes", map[string]bool{"flat": true}, &nodes)
	return nodes, err
}

// disksPermitted finds it out from the permissions of the devices on their drives; QEMU before 10.0 shows nothing else.
// A device has the permission to write as soon as its drive is active, unless the drive is read-only. It has no
// permission once the drive is given up (blk_root_activate and blk_root_inactivate in block/block-backend.c).
func (vm *VM) disksPermitted(ctx context.Context) (bool, error) {
	var graph struct {
		Nodes []struct {
			ID   json.Number `json:"id"`
			Type string      `json:"type"`
		} `json:"nodes"`
		Edges []struct {
			Parent json.Number `json:"parent"`
			Perm   []string    `json:"perm"`
		} `json:"edges"`
	}
	if err := vm.QMP.Do(ctx, "x-debug-query-block-graph", nil, &graph); err != nil {
		return false, err
	}
	backend := map[json.Number]bool{}
	for _, n := range graph.Nodes {
		backend[n.ID] = n.Type == "block-backend"
	}
	written := false
	for _, e := range graph.Edges {
		if !backend[e.Parent] {
			continue
		}
		if len(e.Perm) == 0 {
			return false, nil // QEMU may hold other disks: it takes them one by one
		}
		written = written || slices.Contains(e.Perm, "write")
	}
	if written {
		return true, nil
	}
	writable, err := vm.writableDrives(ctx)
	return !writable, err
}

// writableDrives reports whether a device has a drive that it may write to once the drive is active.
func (vm *VM) writableDrives(ctx context.Context) (bool, error) {
	var drives []struct {
		Device   string `json:"qdev"`
		Inserted *struct {
			ReadOnly bool `json:"ro"`
		} `json:"inserted"`
	}
	err := vm.QMP.Do(ctx, "query-block", nil, &drives)
	for _, d := range drives {
		if d.Device != "" && d.Inserted != nil && !d.Inserted.ReadOnly {
			return true, err
		}
	}
	return false, err
}

// ActivateDisks takes the disks of a stopped VM back. able is false when this QEMU cannot: before 10.0 only Cont does.
func (vm *VM) ActivateDisks(ctx context.Context) (able bool, err error) {
	if !vm.saysActive() {
		return false, nil
	}
	return true, vm.QMP.Do(ctx, "blockdev-set-active", map[string]bool{"active": true}, nil)
}
