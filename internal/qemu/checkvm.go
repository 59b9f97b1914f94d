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
		checkState, checkCapabilities, checkRAM, checkBlockers, checkDisks,
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

func checkState(ctx context.Context, vm *VM) ([]Result, error) {
	s, err := vm.runState(ctx)
	if err != nil {
		return nil, err
	}
	r := Result{Subject: "state", Detail: fmt.Sprintf("the VM is %q", s.Status)}
	switch s.Status {
	case "running":
	case "paused", "prelaunch", "suspended":
		r.Status = Warning
		r.Remedy = "nothing, if that is wanted: it will be so at the destination too"
	case "inmigrate":
		r.Status, r.Remedy = Failed, "name the VM's source: this QEMU waits for a migration"
	case "postmigrate":
		r.Status, r.Remedy = Failed, "migrate the VM from the host on which it runs: it has left this one"
	default:
		// shutdown, guest-panicked, io-error, internal-error, watchdog, save-vm, restore-vm, ...
		r.Status, r.Remedy = Failed, "bring the VM to run or pause it, then try again"
	}
	return []Result{r}, nil
}

func checkCapabilities(ctx context.Context, vm *VM) ([]Result, error) {
	have, err := vm.capabilities(ctx)
	if err != nil {
		return nil, err
	}
	r := Result{Subject: "QEMU version", Detail: fmt.Sprintf("QEMU %s can leave the guest's RAM to migrated", vm.QMP.Version())}
	if missing := lacking(have, capEvents, capIgnoreShared, capLateBlock); len(missing) > 0 {
		r.Status, r.Detail = Failed, fmt.Sprintf("QEMU %s lacks the migration capability %s", vm.QMP.Version(), strings.Join(missing, ", "))
		r.Remedy = "restart the VM with QEMU 4.0 or newer"
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
	if len(blocks) == 0 {
		return []Result{{Subject: "RAM", Status: Failed, Detail: "the VM has no memory backend", Remedy: useBackend}}, nil
	}
	results := make([]Result, 0, len(blocks))
	for _, b := range blocks {
		results = append(results, Result{
			Subject: fmt.Sprintf("RAM %q", b.ID),
			Detail:  fmt.Sprintf("%d MiB in pages of %d KiB, shared, in %s", b.Size>>20, b.PageSize>>10, b.MemPath),
		})
	}
	return results, nil
}

// checkBlockers asks which devices refuse to be migrated. QEMU before 6.0 does not tell; the migration then
// fails while the source still has the VM.
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
	if len(info.BlockedReasons) == 0 {
		return []Result{{Subject: "devices", Detail: "none of them blocks migration"}}, nil
	}
	var results []Result
	for _, reason := range info.BlockedReasons {
		results = append(results, Result{
			Subject: "devices", Status: Failed, Detail: oneLine(reason), Remedy: "unplug the device, or start the VM without it",
		})
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
