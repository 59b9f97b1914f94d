// SPDX-License-Identifier: Apache-2.0

package check

import (
	"context"
	"fmt"

	"github.com/migrated-vm/migrated/internal/qemu"
)

// Tasks finds work that QEMU does besides running the VM. It would end silently with this QEMU, because the
// destination's QEMU knows nothing of it.
func Tasks(ctx context.Context, vm *qemu.VM) ([]Result, error) {
	var results []Result
	for _, check := range []func(context.Context, *qemu.VM) ([]Result, error){checkJobs, checkExports, checkBitmaps} {
		found, err := check(ctx, vm)
		if err != nil {
			return nil, err
		}
		results = append(results, found...)
	}
	return results, nil
}

// checkJobs refuses block jobs that have not ended. A concluded job has ended; its result has not been read yet.
func checkJobs(ctx context.Context, vm *qemu.VM) ([]Result, error) {
	var jobs []struct {
		ID     string `json:"id"`
		Type   string `json:"type"`
		Status string `json:"status"`
	}
	if err := vm.QMP.Do(ctx, "query-jobs", nil, &jobs); err != nil {
		return nil, err
	}
	var results []Result
	for _, j := range jobs {
		if j.Status == "concluded" || j.Status == "null" {
			continue
		}
		remedy := "wait until it has ended, or end it with QMP job-cancel, then try again"
		if j.Type == "mirror" {
			remedy = "complete it with QMP job-complete, or end it with job-cancel, then try again"
		}
		results = append(results, Result{
			Subject: "block jobs", Status: Failed,
			Detail: fmt.Sprintf("the job %q (%s, %s) is this QEMU's alone and would be lost", j.ID, j.Type, j.Status),
			Remedy: remedy,
		})
	}
	return results, nil
}

// checkExports refuses exports, through which clients read or write the VM's disks by way of its QEMU.
func checkExports(ctx context.Context, vm *qemu.VM) ([]Result, error) {
	var exports []struct {
		ID   string `json:"id"`
		Type string `json:"type"`
		Node string `json:"node-name"`
	}
	if err := vm.QMP.Do(ctx, "query-block-exports", nil, &exports); err != nil {
		return nil, err
	}
	results := make([]Result, 0, len(exports))
	for _, e := range exports {
		results = append(results, Result{
			Subject: "exports", Status: Failed,
			Detail: fmt.Sprintf("QEMU serves the block node %q to others by the export %q (%s), which would be lost, "+
				"and which keeps QEMU from giving its disks up", e.Node, e.ID, e.Type),
			Remedy: "let its clients end, and remove it with QMP block-export-del, or nbd-server-stop",
		})
	}
	return results, nil
}

// checkBitmaps refuses dirty bitmaps that would be lost. Persistent bitmaps are stored in the images. A bitmap without
// a name belongs to a job.
func checkBitmaps(ctx context.Context, vm *qemu.VM) ([]Result, error) {
	var nodes []struct {
		Name    string `json:"node-name"`
		Bitmaps []struct {
			Name       string `json:"name"`
			Persistent bool   `json:"persistent"`
		} `json:"dirty-bitmaps"`
	}
	if err := vm.QMP.Do(ctx, "query-named-block-nodes", map[string]bool{"flat": true}, &nodes); err != nil {
		return nil, err
	}
	var results []Result
	for _, n := range nodes {
		for _, b := range n.Bitmaps {
			if b.Persistent || b.Name == "" {
				continue
			}
			results = append(results, Result{
				Subject: "dirty bitmaps", Status: Failed,
				Detail: fmt.Sprintf("the dirty bitmap %q of the block node %q is in memory alone and would be lost, "+
					"and with it what the next incremental backup has to copy", b.Name, n.Name),
				Remedy: "remove it with QMP block-dirty-bitmap-remove, and take a full backup after the migration; " +
					"one that was made with persistent=true moves with its image",
			})
		}
	}
	return results, nil
}
