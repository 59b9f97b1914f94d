// SPDX-License-Identifier: Apache-2.0

package check

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/ram"
)

// VM checks whether a VM can be moved from this host.
func VM(ctx context.Context, vm *qemu.VM) []Result {
	var results []Result
	for _, check := range []func(context.Context, *qemu.VM) ([]Result, error){
		State, checkVersion, checkRAM, checkBlockers, checkDisks, Tasks, checkDomain,
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

// State checks whether a VM can be moved in its present state.
func State(ctx context.Context, vm *qemu.VM) ([]Result, error) {
	status, err := vm.Status(ctx)
	if err != nil {
		return nil, err
	}
	r := Result{Subject: "state", Detail: fmt.Sprintf("the VM is %q", status)}
	switch status {
	case "running":
	case "paused", "prelaunch":
		r.Status = Warning
		r.Remedy = "nothing, if that is wanted: it will be paused at the destination too"
	case "suspended":
		r.Status = Failed
		r.Remedy = "wake the guest up (QMP system_wakeup), then try again " +
			"(the device state does not record that the guest sleeps)"
	case "inmigrate":
		r.Status, r.Remedy = Failed, "name the VM's source: this QEMU waits for a migration"
	case "postmigrate":
		// QEMU has migrated the VM itself, to a host or into a file. It is not known which.
		r.Status = Failed
		r.Remedy = "migrate the VM from the host on which it runs, if it runs on another; " +
			"if this is the only copy, continue it here (QMP cont), then try again"
	default:
		// shutdown, guest-panicked, io-error, internal-error, watchdog, save-vm, restore-vm, ...
		r.Status, r.Remedy = Failed, "get the VM running, or pause it, then try again"
	}
	return []Result{r}, nil
}

// oldestQEMU is the oldest major version that reports which devices of a VM cannot be moved. qemu.Saver does not detect
// that.
const oldestQEMU = 6

func checkVersion(ctx context.Context, vm *qemu.VM) ([]Result, error) {
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

func checkRAM(ctx context.Context, vm *qemu.VM) ([]Result, error) {
	blocks, err := vm.RAM.Blocks(ctx)
	if err != nil {
		causes := []error{err}
		var joined interface{ Unwrap() []error }
		if errors.As(err, &joined) {
			causes = joined.Unwrap()
		}
		var results []Result
		for _, cause := range causes {
			var bad *ram.Error
			if !errors.As(cause, &bad) {
				return nil, err
			}
			results = append(results, Result{
				Subject: fmt.Sprintf("RAM %q", bad.ID), Status: Failed, Detail: bad.Reason, Remedy: bad.Remedy,
			})
		}
		return results, nil
	}
	mapped, unseen, err := vm.RAM.Mapped(blocks)
	if err != nil {
		return nil, err
	}
	results := make([]Result, 0, len(blocks))
	for _, b := range blocks {
		shared := false
		for _, refused := range mapped {
			if refused.ID == b.ID {
				shared = true
				results = append(results, Result{
					Subject: fmt.Sprintf("RAM %q", b.ID), Status: Failed, Detail: refused.Reason, Remedy: refused.Remedy,
				})
			}
		}
		if !shared && b.Size >= 1<<20 {
			results = append(results, Result{Subject: fmt.Sprintf("RAM %q", b.ID), Detail: describe(b)})
		}
	}
	if unseen > 0 {
		results = append(results, Result{
			Subject: "other users of the RAM", Status: Warning,
			Detail: fmt.Sprintf("this daemon may not look into %d processes: whether one of them maps it is not known", unseen),
			Remedy: "run the daemon as root or with CAP_SYS_PTRACE, or see that no other process uses the VM's memory",
		})
	}
	if slices.ContainsFunc(blocks, func(b ram.Block) bool { return b.Private && !b.ReadOnly }) {
		results = append(results, Result{
			Subject: "private RAM",
			Detail:  "only QEMU has this RAM: keep the source's QEMU until the last page has left",
		})
	}
	return results, nil
}

// describe describes a block in one line.
func describe(b ram.Block) string {
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

// checkBlockers asks QEMU which devices refuse to be migrated. It also refuses devices whose state qemu.Saver does not
// save, because QEMU moves that state in portions while the VM runs.
func checkBlockers(ctx context.Context, vm *qemu.VM) ([]Result, error) {
	info, err := vm.QueryMigrate(ctx)
	if err != nil {
		return nil, err
	}
	if info.Active() {
		return []Result{{
			Subject: "migration by QEMU", Status: Failed,
			Detail: fmt.Sprintf("QEMU migrates the VM itself, it is %q", info.Status),
			Remedy: "wait for it, or cancel it with QMP migrate_cancel",
		}}, nil
	}
	var results []Result
	for _, reason := range info.BlockedReasons {
		results = append(results, Result{
			Subject: "devices", Status: Failed, Detail: oneLine(reason), Remedy: "unplug the device, or start the VM without it",
		})
	}
	outside, err := checkOutside(ctx, vm)
	if err != nil {
		return nil, err
	}
	results = append(results, outside...)
	if len(results) == 0 {
		results = append(results, Result{Subject: "devices", Detail: "none of them blocks migration"})
	}
	return results, nil
}

func checkDisks(ctx context.Context, vm *qemu.VM) ([]Result, error) {
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
