// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// CheckVM says whether a VM can be moved from this host.
func CheckVM(ctx context.Context, vm *VM) []Result {
	var results []Result
	for _, check := range []func(context.Context, *VM) ([]Result, error){
		CheckState, checkVersion, checkRAM, checkBlockers, checkDisks, CheckTasks,
	} {
		found, err := check(ctx, vm)
		if err != nil {
			return append(results, Result{
				Subject: "QEMU", Status: Failed, Detail: err.Error(), Remedy: "see that QEMU answers on its QMP socket",
			})
		}
		results = append(results, found...)
	}
	return results
}

// CheckState says whether a VM can be moved in the state that it is in now.
func CheckState(ctx context.Context, vm *VM) ([]Result, error) {
	s, err := vm.runState(ctx)
	if err != nil {
		return nil, err
	}
	r := Result{Subject: "state", Detail: fmt.Sprintf("the VM is %q", s.Status)}
	switch s.Status {
	case "running":
	case "paused", "prelaunch":
		r.Status = Warning
		r.Remedy = "nothing, if that is wanted: it will be paused at the destination too"
	case "suspended":
		r.Status = Failed
		r.Remedy = "wake the guest up (QMP system_wakeup), then try again: that it sleeps is not in the state of its devices"
	case "inmigrate":
		r.Status, r.Remedy = Failed, "name the VM's source: this QEMU waits for a migration"
	case "postmigrate":
		// By a migration of QEMU's own, to a host or into a file. Nobody here knows which.
		r.Status = Failed
		r.Remedy = "migrate the VM from the host on which it runs, if it runs on another; if this is all that there is of it, " +
			"continue it here (QMP cont), then try again"
	default:
		// shutdown, guest-panicked, io-error, internal-error, watchdog, save-vm, restore-vm, ...
		r.Status, r.Remedy = Failed, "bring the VM to run or pause it, then try again"
	}
	return []Result{r}, nil
}

// oldestQEMU is the oldest version that says which of a VM's devices cannot be moved. Saver would not notice.
const oldestQEMU = 6

func checkVersion(ctx context.Context, vm *VM) ([]Result, error) {
	var commands []struct {
		Name string `json:"name"`
	}
	if err := vm.QMP.Do(ctx, "query-commands", nil, &commands); err != nil {
		return nil, err
	}
	able := map[string]bool{}
	for _, c := range commands {
		able[c.Name] = true
	}
	r := Result{
		Subject: "QEMU version",
		Detail:  fmt.Sprintf("QEMU %s can save the state of the VM's devices", vm.QMP.Version()),
	}
	for _, name := range []string{"xen-save-devices-state", "human-monitor-command", "add-fd"} {
		if !able[name] {
			r.Status, r.Detail = Failed, fmt.Sprintf("QEMU %s has no command %s", vm.QMP.Version(), name)
			r.Remedy = "use a QEMU of version 6.0 or newer that was built with it"
			return []Result{r}, nil
		}
	}
	if vm.QMP.Version().Major < oldestQEMU {
		r.Status, r.Detail = Failed, fmt.Sprintf("QEMU %s does not say which devices cannot be moved", vm.QMP.Version())
		r.Remedy = "restart the VM with QEMU 6.0 or newer"
	}
	return []Result{r}, nil
}

func checkRAM(ctx context.Context, vm *VM) ([]Result, error) {
	blocks, err := vm.RAMBlocks(ctx)
	if err != nil {
		causes := []error{err}
		var joined interface{ Unwrap() []error }
		if errors.As(err, &joined) {
			causes = joined.Unwrap()
		}
		var results []Result
		for _, cause := range causes {
			var bad *RAMError
			if !errors.As(cause, &bad) {
				return nil, err
			}
			results = append(results, Result{
				Subject: fmt.Sprintf("RAM %q", bad.ID), Status: Failed, Detail: bad.Reason, Remedy: bad.Remedy,
			})
		}
		return results, nil
	}
	neighbours, err := vm.neighbours(blocks)
	if err != nil {
		return nil, err
	}
	results := make([]Result, 0, len(blocks))
	for _, b := range blocks {
		switch other := neighbours[b.ID]; {
		case other != 0:
			results = append(results, Result{
				Subject: fmt.Sprintf("RAM %q", b.ID), Status: Failed,
				Detail: fmt.Sprintf("process %d uses it as well, as the back end of a vhost-user device does: "+
					"nothing makes that wait for pages that have not come", other),
				Remedy: "unplug the device, or end that process",
			})
		case b.Size >= 1<<20:
			results = append(results, Result{Subject: fmt.Sprintf("RAM %q", b.ID), Detail: b.describe()})
		}
	}
	if slices.ContainsFunc(blocks, func(b RAMBlock) bool { return b.Private && !b.ReadOnly }) {
		results = append(results, Result{
			Subject: "private RAM",
			Detail:  "it is QEMU's alone: until the last page has left, the VM needs this QEMU at the source",
		})
	}
	return results, nil
}

// describe says what a block is, in a line.
func (b RAMBlock) describe() string {
	kind, where := "shared", "without a file"
	if b.Private {
		kind = "private"
	}
	if b.ReadOnly {
		kind = "read-only"
	}
	if b.File != "" {
		where = "in " + b.File
	}
	return fmt.Sprintf("%d MiB in pages of %d KiB, %s, %s", b.Size>>20, b.PageSize>>10, kind, where)
}

// checkBlockers asks which devices refuse to be migrated, and looks for those whose state is not in what Saver saves:
// QEMU moves it in portions, while the VM runs.
func checkBlockers(ctx context.Context, vm *VM) ([]Result, error) {
	info, err := vm.queryMigrate(ctx)
	if err != nil {
		return nil, err
	}
	if info.active() {
		return []Result{{
			Subject: "migration by QEMU", Status: Failed,
			Detail: fmt.Sprintf("QEMU migrates the VM itself, it is %q", info.Status), Remedy: "wait for it, or cancel it with QMP migrate_cancel",
		}}, nil
	}
	var results []Result
	for _, reason := range info.BlockedReasons {
		results = append(results, Result{
			Subject: "devices", Status: Failed, Detail: oneLine(reason), Remedy: "unplug the device, or start the VM without it",
		})
	}
	assigned, err := vm.assignedDevices(ctx)
	if err != nil {
		return nil, err
	}
	for _, path := range assigned {
		results = append(results, Result{
			Subject: "devices", Status: Failed,
			Detail: path + " is a device of this host (VFIO), whose state migrated cannot move",
			Remedy: "unplug the device, or start the VM without it",
		})
	}
	if len(results) == 0 {
		results = append(results, Result{Subject: "devices", Detail: "none of them blocks migration"})
	}
	return results, nil
}

// assignedDevices are the VM's VFIO devices.
func (vm *VM) assignedDevices(ctx context.Context) (paths []string, err error) {
	devices, err := vm.UserDevices(ctx)
	for _, d := range devices {
		if path, kind, _ := strings.Cut(d, " "); strings.HasPrefix(kind, "child<vfio") {
			paths = append(paths, path)
		}
	}
	return paths, err
}

func checkDisks(ctx context.Context, vm *VM) ([]Result, error) {
	disks, err := vm.Disks(ctx)
	if err != nil {
		return nil, err
	}
	var local []string
	for _, d := range disks {
		if d.Local {
			local = append(local, d.File)
		}
	}
	slices.Sort(local)
	local = slices.Compact(local)
	switch {
	case len(disks) == 0:
		return []Result{{Subject: "disks", Detail: "the VM has none"}}, nil
	case len(local) == 0:
		return []Result{{Subject: "disks", Detail: "all are on network storage"}}, nil
	}
	results := make([]Result, 0, len(local))
	for _, file := range local {
		results = append(results, Result{
			Subject: "disks", Status: Warning, Detail: file + " is on no network file system, as far as this host knows",
			Remedy: "see that the destination has the same storage under the same path (NFS, a SAN, ...): disks are not copied",
		})
	}
	return results, nil
}

func oneLine(text string) string { return strings.Join(strings.Fields(text), " ") }
