// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"encoding/json"
	"slices"
)

// DisksActive reports whether QEMU holds the VM's disks. It does not after Saver.Save gave them up, nor while the
// source still has them (late-block-activate). For a VM without disks it returns true.
func (vm *VM) DisksActive(ctx context.Context) (bool, error) {
	var nodes []struct {
		Active *bool `json:"active"` // since QEMU 10.0
	}
	if err := vm.QMP.Do(ctx, "query-named-block-nodes", map[string]bool{"flat": true}, &nodes); err != nil {
		return false, err
	}
	if len(nodes) == 0 || nodes[0].Active == nil {
		return vm.disksPermitted(ctx)
	}
	for _, n := range nodes {
		if n.Active != nil && !*n.Active {
			return false, nil
		}
	}
	return true, nil
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
	if v := vm.QMP.Version(); v.Major < 10 {
		return false, nil
	}
	return true, vm.QMP.Do(ctx, "blockdev-set-active", map[string]bool{"active": true}, nil)
}
