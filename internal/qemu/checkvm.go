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
	mapped, unseen, err := vm.mappers(blocks)
	if err != nil {
		return nil, err
	}
	results := make([]Result, 0, len(blocks))
	for _, b := range blocks {
		shared := false
		for _, m := range mapped {
			if m.block.ID == b.ID {
				shared = true
				refused := m.refusal()
				results = append(results, Result{
					Subject: fmt.Sprintf("RAM %q", b.ID), Status: Failed, Detail: refused.Reason, Remedy: refused.Remedy,
				})
			}
		}
		if !shared && b.Size >= 1<<20 {
			results = append(results, Result{Subject: fmt.Sprintf("RAM %q", b.ID), Detail: b.describe()})
		}
	}
	if unseen > 0 {
		results = append(results, Result{
			Subject: "who maps the RAM", Status: Warning,
			Detail: fmt.Sprintf("this daemon may not look into %d processes: whether one of them maps it is not known", unseen),
			Remedy: "run the daemon as root or with CAP_SYS_PTRACE, or see that no other process uses the VM's memory",
		})
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
	outside, err := vm.checkOutside(ctx)
	if err != nil {
		return nil, err
	}
	results = append(results, outside...)
	if len(results) == 0 {
		results = append(results, Result{Subject: "devices", Detail: "none of them blocks migration"})
	}
	return results, nil
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
