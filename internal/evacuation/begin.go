// SPDX-License-Identifier: Apache-2.0

package evacuation

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/migrated-vm/migrated/internal/migration"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// beginSome begins migrations until as many are under way as are allowed. moving are under way already.
func (e *evacuation) beginSome(ctx context.Context, moving int) {
	most := int(e.spec.GetAtOnce())
	if most == 0 {
		most = e.host.MaxOutgoing()
	}
	view, _ := e.Snapshot()
	for _, vm := range view.GetVms() {
		if moving >= most || e.state() != migratedv1.EvacuationState_EVACUATION_STATE_RUNNING {
			break
		}
		if vm.GetState() != migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_WAITING ||
			time.Now().Before(e.retry[key(vm.GetVm(), vm.GetPid())]) {
			continue
		}
		all, err := e.allVMs(ctx)
		if err != nil {
			e.updateVM(key(vm.GetVm(), vm.GetPid()), func(v *migratedv1.EvacuatedVM) {
				v.Error = migration.Describe(fmt.Errorf("which VMs are on this host is not known: %w", err))
			})
			return // the next step tries again
		}
		switch location, why := changedSince(vm, all); {
		case why == nil:
			if e.begin(ctx, view.GetId(), vm) {
				moving++
			}
		case location == migratedv1.Location_LOCATION_SOURCE && e.postpone(vm):
		default:
			e.giveUp(vm, why, location)
		}
	}
}

// postpone puts off a VM that is here but cannot be reached, for example while libvirt's daemon restarts. It returns
// false when that has lasted as long as mostAttempts attempts take.
func (e *evacuation) postpone(vm *migratedv1.EvacuatedVM) bool {
	name := key(vm.GetVm(), vm.GetPid())
	e.unreached[name]++
	e.retry[name] = time.Now().Add(pauseAfter(e.unreached[name]))
	return e.unreached[name] < mostAttempts
}

// pauseAfter returns the pause after that many attempts.
func pauseAfter(attempts uint32) time.Duration { return min(retryTime<<(attempts-1), mostRetryTime) }

// allVMs returns the VMs that run here at this moment.
func (e *evacuation) allVMs(ctx context.Context) ([]*migratedv1.HostVM, error) {
	ctx, cancel := context.WithTimeout(ctx, findTime)
	defer cancel()
	return e.host.VMs(ctx)
}

// changedSince returns why a VM of the plan must not be moved although it could be when the plan was made, and where it
// is. all are the VMs of this host now: an evacuation may be paused for hours, and meanwhile another VM may have got
// the address. nil: it is still the same process.
func changedSince(vm *migratedv1.EvacuatedVM, all []*migratedv1.HostVM) (location migratedv1.Location, why error) {
	at := slices.IndexFunc(all, func(v *migratedv1.HostVM) bool { return v.GetVm() == vm.GetVm() })
	lives := slices.ContainsFunc(all, func(v *migratedv1.HostVM) bool { return v.GetPid() == vm.GetPid() })
	location = migratedv1.Location_LOCATION_UNKNOWN
	if lives {
		location = migratedv1.Location_LOCATION_SOURCE
	}
	switch {
	case at >= 0 && all[at].GetPid() == vm.GetPid() && all[at].GetProblem() != "": // it was handed over since
		return migratedv1.Location_LOCATION_UNKNOWN, errors.New(all[at].GetProblem())
	case at >= 0 && all[at].GetPid() == vm.GetPid():
		return location, nil
	case at >= 0:
		why = migration.WithRemedy(
			fmt.Errorf("at %s there is another VM by now, process %d: the plan is for process %d",
				vm.GetVm(), all[at].GetPid(), vm.GetPid()),
			"evacuate the host again")
	case lives:
		why = migration.WithRemedy(
			fmt.Errorf("its QEMU, process %d, is no longer reached at %s", vm.GetPid(), vm.GetVm()),
			"evacuate the host again")
	default:
		why = migration.WithRemedy(fmt.Errorf("its QEMU, process %d, is no longer on this host: the VM has ended, "+
			"or somebody else has moved it, since the plan was made", vm.GetPid()),
			"look where the VM is; nothing has to be done if it was shut down or moved on purpose")
	}
	return location, why
}

// giveUp sets the last state of a VM whose next migration does not begin.
func (e *evacuation) giveUp(vm *migratedv1.EvacuatedVM, why error, location migratedv1.Location) {
	state := migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_CANNOT_MOVE
	if vm.GetAttempts() > 0 {
		state = migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_FAILED
	}
	e.updateVM(key(vm.GetVm(), vm.GetPid()), func(v *migratedv1.EvacuatedVM) {
		v.State, v.Location, v.Error = state, location, migration.Describe(why)
	})
}

// begin begins one migration, unless the evacuation was paused or cancelled meanwhile. It first saves the evacuation
// with the id of the migration, so that a restarted daemon looks for it.
func (e *evacuation) begin(ctx context.Context, id string, vm *migratedv1.EvacuatedVM) bool {
	name := key(vm.GetVm(), vm.GetPid())
	vm.Attempts++
	vm.Migration = e.migrationID(id, vm)
	running := false
	e.update(func(view *migratedv1.Evacuation) {
		if running = view.GetState() == migratedv1.EvacuationState_EVACUATION_STATE_RUNNING; !running {
			return
		}
		v := find(view, name)
		v.State, v.Attempts, v.Migration = migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_MOVING, vm.Attempts, vm.Migration
		v.MigrationState, v.Error = migratedv1.MigrationState_MIGRATION_STATE_UNSPECIFIED, nil
	})
	if !running {
		return false
	}
	err := e.save()
	if err == nil {
		err = e.host.Start(ctx, vm.GetMigration(), e.specOf(vm))
	}
	if err == nil {
		return true
	}
	e.updateVM(name, func(v *migratedv1.EvacuatedVM) {
		v.State, v.Error = migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_CANNOT_MOVE, migration.Describe(err)
		v.Migration = ""
	})
	return false
}

// migrationID returns an id for the next migration of a VM, made of the VM's index in the evacuation and the number of
// the attempt. A migration of an earlier evacuation of the same id may have it: it is left out, as the end of that one
// would be taken for this one's.
func (e *evacuation) migrationID(id string, vm *migratedv1.EvacuatedVM) string {
	view, _ := e.Snapshot()
	n := slices.IndexFunc(view.GetVms(), func(v *migratedv1.EvacuatedVM) bool {
		return key(v.GetVm(), v.GetPid()) == key(vm.GetVm(), vm.GetPid())
	})
	base := fmt.Sprintf("%s-%d-%d", id, n+1, vm.GetAttempts())
	free := base
	for i := 2; ; i++ {
		if taken, _ := e.host.Migration(free); taken == nil {
			return free
		}
		free = fmt.Sprintf("%s.%d", base, i)
	}
}

// specOf returns the specification of the migration of a VM.
func (e *evacuation) specOf(vm *migratedv1.EvacuatedVM) *migratedv1.MigrationSpec {
	spec := proto.CloneOf(e.spec.GetMigration())
	if spec == nil {
		spec = &migratedv1.MigrationSpec{}
	}
	spec.Vm, spec.Destination = vm.GetVm(), vm.GetDestination()
	if spec.Labels == nil {
		spec.Labels = make(map[string]string)
	}
	spec.Labels[Label] = e.view.GetId() // needs no lock: it never changes
	for name, weight := range e.spec.GetWeights() {
		if name == vm.GetName() || name == vm.GetVm() {
			spec.Weight = weight
		}
	}
	return spec
}

// needsOf returns how much of a destination's memory a VM takes.
func (e *evacuation) needsOf(vm *migratedv1.EvacuatedVM) Needs {
	needs := make(Needs)
	for _, m := range vm.GetMemory() {
		needs[m.GetPageSize()] = m.GetBytes()
		if e.spec.GetOvercommit() {
			needs[m.GetPageSize()] = m.GetBytesHeld()
		}
	}
	return needs
}
