// SPDX-License-Identifier: Apache-2.0

package evacuation

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/migrated-vm/migrated/internal/migration"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// follow copies the state of a VM's migration into the evacuation, and says whether the migration is under way.
func (e *evacuation) follow(ctx context.Context, vm *migratedv1.EvacuatedVM, state migratedv1.EvacuationState) bool {
	view, over := e.host.Migration(vm.GetMigration())
	name := key(vm.GetVm(), vm.GetPid())
	if view == nil {
		e.lost(ctx, vm)
		return false
	}
	e.updateVM(name, func(v *migratedv1.EvacuatedVM) {
		v.MigrationState, v.Location, v.Waiting = view.GetState(), view.GetLocation(), view.GetWaiting()
		if p := view.GetProgress(); p.GetPagesTotal() > 0 {
			v.Fraction = min(1, float64(p.GetPagesPresent())/float64(p.GetPagesTotal()))
		}
		v.Downtime, v.Error = view.GetProgress().GetDowntime(), view.GetError()
	})
	if !migration.Terminal(view.GetState()) || !over {
		if state == migratedv1.EvacuationState_EVACUATION_STATE_CANCELLING &&
			view.GetState() <= migratedv1.MigrationState_MIGRATION_STATE_DEVICE {
			_ = e.host.Cancel(vm.GetMigration()) // fails if the VM is handed over by now; then it is followed to the end
		}
		return true
	}
	location, err := e.whereNow(ctx, vm, view)
	if err != nil {
		return true // the next step tries again
	}
	e.ended(vm, view, location)
	return false
}

// whereNow returns where a VM is whose migration has ended. A migration that failed before it looked at the VM, for
// example as it waited for its turn, does not know: the VM is here if its process is.
func (e *evacuation) whereNow(
	ctx context.Context, vm *migratedv1.EvacuatedVM, view *migratedv1.Migration,
) (migratedv1.Location, error) {
	if view.GetState() != migratedv1.MigrationState_MIGRATION_STATE_FAILED ||
		view.GetLocation() != migratedv1.Location_LOCATION_UNKNOWN || view.GetSwitchTime() != nil {
		return view.GetLocation(), nil
	}
	all, err := e.allVMs(ctx)
	location, _ := changedSince(vm, all)
	return location, err
}

// ended sets the state of a VM whose migration has ended, and which is at location.
func (e *evacuation) ended(vm *migratedv1.EvacuatedVM, view *migratedv1.Migration, location migratedv1.Location) {
	name := key(vm.GetVm(), vm.GetPid())
	setState := func(state migratedv1.EvacuatedVMState) {
		e.updateVM(name, func(v *migratedv1.EvacuatedVM) { v.State, v.Location = state, location })
	}
	switch {
	case view.GetState() == migratedv1.MigrationState_MIGRATION_STATE_COMPLETED &&
		view.GetError().GetReason() == migratedv1.Reason_REASON_INTERFERED: // the VM runs on both hosts
		location = migratedv1.Location_LOCATION_UNKNOWN
		setState(migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_FAILED)
	case view.GetState() == migratedv1.MigrationState_MIGRATION_STATE_ENDED &&
		location == migratedv1.Location_LOCATION_SOURCE: // it ended there, and somebody has continued it here
		setState(migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_FAILED)
	case view.GetState() == migratedv1.MigrationState_MIGRATION_STATE_COMPLETED:
		setState(migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_MOVED)
	case view.GetState() == migratedv1.MigrationState_MIGRATION_STATE_ENDED,
		location == migratedv1.Location_LOCATION_ENDED:
		setState(migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_ENDED)
	case view.GetState() == migratedv1.MigrationState_MIGRATION_STATE_CANCELLED:
		setState(migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_CANCELLED)
	case location == migratedv1.Location_LOCATION_SOURCE && e.retryLater(vm, view.GetError()):
		setState(migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_WAITING)
	default:
		setState(migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_FAILED)
	}
}

// worthRetrying are the reasons of failures that may not happen with another destination, or after a while. A failure
// with REASON_UNSPECIFIED is one that no rule foresaw, such as a QEMU that did not answer in time on a busy host.
var worthRetrying = []migratedv1.Reason{
	migratedv1.Reason_REASON_UNSPECIFIED,
	migratedv1.Reason_REASON_DESTINATION_REFUSED, migratedv1.Reason_REASON_UNREACHABLE,
	migratedv1.Reason_REASON_LOAD_FAILED, migratedv1.Reason_REASON_DESTINATION_QEMU_ENDED,
	migratedv1.Reason_REASON_NO_MEMORY, migratedv1.Reason_REASON_VERSION, migratedv1.Reason_REASON_NO_TURN,
	migratedv1.Reason_REASON_DAEMON_ENDED, migratedv1.Reason_REASON_PROTOCOL, migratedv1.Reason_REASON_MIGRATION_UNKNOWN,
	migratedv1.Reason_REASON_LIMIT_MISSED,
	// The failures of a daemon that ended between the switch and the answer.
	migratedv1.Reason_REASON_PAGES_UNREACHABLE, migratedv1.Reason_REASON_PAGES_REFUSED,
	migratedv1.Reason_REASON_HANDOVER_UNANSWERED,
}

// retryLater prepares another attempt to move a VM that is still here: with another destination, or with the same one
// if there is no other. It returns false if another attempt is of no use, or if there were mostAttempts.
func (e *evacuation) retryLater(vm *migratedv1.EvacuatedVM, failure *migratedv1.MigrationError) bool {
	if vm.GetAttempts() >= mostAttempts || !slices.Contains(worthRetrying, failure.GetReason()) {
		return false
	}
	name := key(vm.GetVm(), vm.GetPid())
	if e.tried[name] == nil {
		e.tried[name] = make(map[string]error)
	}
	e.tried[name][vm.GetDestination()] = errors.New(failure.GetMessage())
	e.retry[name] = time.Now().Add(pauseAfter(vm.GetAttempts()))
	needs := e.needsOf(vm)
	e.placer.remove(name, needs)
	host, err := e.placer.place(name, needs, func(host string) error { return e.tried[name][host] })
	if err != nil { // the same one again
		host = vm.GetDestination()
		e.placer.restore(name, needs, host, false)
	}
	e.updateVM(name, func(v *migratedv1.EvacuatedVM) { v.Destination = host })
	return true
}

// lost sets the state of a VM whose migration is unknown. That is so if the daemon ended before the migration began, or
// if nothing was left of the migration. A VM that is here waits for another attempt, before which beginSome compares it
// with the plan.
func (e *evacuation) lost(ctx context.Context, vm *migratedv1.EvacuatedVM) {
	all, err := e.allVMs(ctx)
	if err != nil {
		return // the next step tries again
	}
	here := slices.ContainsFunc(all, func(v *migratedv1.HostVM) bool { return v.GetPid() == vm.GetPid() })
	location, _ := changedSince(vm, all)
	name := key(vm.GetVm(), vm.GetPid())
	switch {
	case here && vm.GetAttempts() < mostAttempts:
		e.retry[name] = time.Now().Add(pauseAfter(vm.GetAttempts()))
		e.updateVM(name, func(v *migratedv1.EvacuatedVM) {
			v.State, v.Migration = migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_WAITING, ""
			v.Location = location
		})
	case here:
		e.giveUp(vm, migration.WithRemedy(
			fmt.Errorf("nothing is known of migration %s, the last of %d: this daemon ended before it was written down",
				vm.GetMigration(), vm.GetAttempts()),
			"see in the daemon's log why it ended (journalctl -u migrated), then evacuate the host again"), location)
	default:
		e.giveUp(vm, migration.WithRemedy(
			fmt.Errorf("the VM's QEMU is no longer on this host, and this daemon does not know how migration %s ended",
				vm.GetMigration()),
			fmt.Sprintf("run on %s: migrated report %s", cmp.Or(vm.GetDestination(), "each destination"), vm.GetMigration())),
			migratedv1.Location_LOCATION_UNKNOWN)
	}
}
