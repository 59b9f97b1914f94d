// SPDX-License-Identifier: Apache-2.0

package evacuation

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/migrated-vm/migrated/internal/migration"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

const (
	// pollInterval is how often the migrations under way are looked at.
	pollInterval = 250 * time.Millisecond
	// mostAttempts is how often an evacuation tries to move one VM. The pauses between the attempts begin with
	// retryTime and double, up to mostRetryTime: together they are longer than a network switch takes to restart.
	mostAttempts  = 6
	retryTime     = 5 * time.Second
	mostRetryTime = time.Minute
)

// Label is the key of a label of the migrations of an evacuation. Its value is the id of the evacuation.
const Label = "evacuation"

// An evacuation is under way or over. One goroutine runs it, in run.
type evacuation struct {
	host Host
	spec *migratedv1.EvacuationSpec
	keep func(view *migratedv1.Evacuation) error // writes it to its file

	mu      sync.Mutex
	view    *migratedv1.Evacuation
	changed chan struct{} // closed, and replaced, by every update
	done    chan struct{} // closed when run has returned
	wake    chan struct{} // has room for one; makes run take its next step at once

	// For the goroutine of run alone.
	placer    *placer
	tried     map[string]map[string]error // by VM: the errors of destinations where it could not be moved
	retry     map[string]time.Time        // by VM: the earliest time of its next attempt
	unreached map[string]uint32           // by VM: how often it was here and not reached at its address
}

func newEvacuation(host Host, view *migratedv1.Evacuation, keep func(*migratedv1.Evacuation) error) *evacuation {
	return &evacuation{
		host: host, spec: view.GetSpec(), keep: keep, view: view, changed: make(chan struct{}), done: make(chan struct{}),
		wake: make(chan struct{}, 1), tried: make(map[string]map[string]error), retry: make(map[string]time.Time),
		unreached: make(map[string]uint32),
	}
}

// Snapshot returns a copy of the current state, and a channel that is closed when it changes.
func (e *evacuation) Snapshot() (*migratedv1.Evacuation, <-chan struct{}) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return proto.CloneOf(e.view), e.changed
}

func (e *evacuation) state() migratedv1.EvacuationState {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.view.GetState()
}

// update changes the state, and tells those who wait for a change if there was one.
func (e *evacuation) update(change func(*migratedv1.Evacuation)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	before := proto.CloneOf(e.view)
	change(e.view)
	if proto.Equal(before, e.view) {
		return
	}
	e.view.UpdateTime = timestamppb.Now()
	close(e.changed)
	e.changed = make(chan struct{})
}

// updateVM changes the state of the VM whose key is name.
func (e *evacuation) updateVM(name string, change func(*migratedv1.EvacuatedVM)) {
	e.update(func(view *migratedv1.Evacuation) { change(find(view, name)) })
}

// find returns the VM of an evacuation whose key is name. There is one: VMs are never taken out.
func find(view *migratedv1.Evacuation, name string) *migratedv1.EvacuatedVM {
	i := slices.IndexFunc(view.GetVms(), func(vm *migratedv1.EvacuatedVM) bool {
		return key(vm.GetVm(), vm.GetPid()) == name
	})
	return view.GetVms()[i]
}

// Over says whether an evacuation in this state is over.
func Over(state migratedv1.EvacuationState) bool {
	switch state {
	case migratedv1.EvacuationState_EVACUATION_STATE_DONE, migratedv1.EvacuationState_EVACUATION_STATE_CANCELLED,
		migratedv1.EvacuationState_EVACUATION_STATE_PLANNED, migratedv1.EvacuationState_EVACUATION_STATE_FAILED:
		return true
	default:
		return false
	}
}

// run runs the evacuation until it is over or ctx ends. In the latter case a restarted daemon continues it.
func (e *evacuation) run(ctx context.Context) {
	defer close(e.done)
	if view, _ := e.Snapshot(); view.GetPlanTime() == nil {
		err := e.plan(ctx)
		if ctx.Err() != nil {
			return // a restarted daemon makes a new plan
		}
		e.planned(err)
	} else {
		e.takeUp(ctx)
	}
	_ = e.save()
	if Over(e.state()) {
		return
	}
	e.host.SetBandwidth(e.spec.GetBandwidth())
	defer e.host.SetBandwidth(0)
	poll := time.NewTicker(pollInterval)
	defer poll.Stop()
	for !e.step(ctx) {
		select {
		case <-poll.C:
		case <-e.wake:
		case <-ctx.Done():
			return
		}
	}
}

// planned sets the state after plan has returned err. The evacuation may have been paused or cancelled meanwhile.
func (e *evacuation) planned(err error) {
	e.update(func(view *migratedv1.Evacuation) {
		view.PlanTime = timestamppb.Now()
		cancelled := view.GetState() == migratedv1.EvacuationState_EVACUATION_STATE_CANCELLING
		if err != nil {
			view.Error = migration.Describe(err)
		}
		switch {
		case err != nil && cancelled:
			end(view, migratedv1.EvacuationState_EVACUATION_STATE_CANCELLED)
		case err != nil:
			end(view, migratedv1.EvacuationState_EVACUATION_STATE_FAILED)
		case cancelled: // step ends it, with its VMs
		case e.spec.GetPlanOnly():
			end(view, migratedv1.EvacuationState_EVACUATION_STATE_PLANNED)
		case view.GetState() == migratedv1.EvacuationState_EVACUATION_STATE_PLANNING:
			view.State = migratedv1.EvacuationState_EVACUATION_STATE_RUNNING
		}
	})
}

// end sets the last state of an evacuation.
func end(view *migratedv1.Evacuation, state migratedv1.EvacuationState) {
	view.State, view.EndTime = state, timestamppb.Now()
}

// save writes the evacuation to its file. keep has logged an error.
func (e *evacuation) save() error {
	view, _ := e.Snapshot()
	return e.keep(view)
}

// step follows the migrations under way, starts others if more are allowed, and says whether the evacuation is over.
func (e *evacuation) step(ctx context.Context) (over bool) {
	before, _ := e.Snapshot()
	moving, waiting := 0, false
	for _, vm := range before.GetVms() {
		switch vm.GetState() {
		case migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_MOVING:
			if e.follow(ctx, vm, before.GetState()) {
				moving++
			}
		case migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_WAITING:
			waiting = true
		}
	}
	state := e.state()
	switch {
	case state == migratedv1.EvacuationState_EVACUATION_STATE_CANCELLING:
		e.cancelWaiting()
	case state == migratedv1.EvacuationState_EVACUATION_STATE_RUNNING && waiting:
		e.beginSome(ctx, moving)
	}
	after, _ := e.Snapshot()
	left := slices.ContainsFunc(after.GetVms(), func(vm *migratedv1.EvacuatedVM) bool { return !Last(vm.GetState()) })
	if !left {
		e.finish(ctx)
	}
	if !left || statesDiffer(before, after) {
		_ = e.save()
	}
	return !left
}

// statesDiffer says whether a and b differ in something that a restarted daemon has to know.
func statesDiffer(a, b *migratedv1.Evacuation) bool {
	return a.GetState() != b.GetState() ||
		!slices.EqualFunc(a.GetVms(), b.GetVms(), func(x, y *migratedv1.EvacuatedVM) bool {
			return x.GetState() == y.GetState() && x.GetMigration() == y.GetMigration() &&
				x.GetDestination() == y.GetDestination()
		})
}

// Last says whether a state is the last one of a VM.
func Last(state migratedv1.EvacuatedVMState) bool {
	return state != migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_WAITING &&
		state != migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_MOVING
}

// cancelWaiting cancels the VMs whose migrations have not begun.
func (e *evacuation) cancelWaiting() {
	e.update(func(view *migratedv1.Evacuation) {
		for _, vm := range view.GetVms() {
			if vm.GetState() == migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_WAITING {
				vm.State = migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_CANCELLED
			}
		}
	})
}

// takeUp makes the placer of an evacuation whose plan an earlier run of the daemon has made. It asks the destinations
// again how much memory they have left. If none answers, VMs go where the plan says, and a destination without room
// refuses them.
func (e *evacuation) takeUp(ctx context.Context) {
	p, _, err := e.askDestinations(ctx)
	if err != nil {
		p = newPlacer(uint64(os.Getpagesize()))
	}
	e.placer = p
	view, _ := e.Snapshot()
	for _, vm := range view.GetVms() {
		if vm.GetDestination() == "" {
			continue
		}
		moved := vm.GetState() != migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_WAITING
		e.placer.restore(key(vm.GetVm(), vm.GetPid()), e.needsOf(vm), vm.GetDestination(), moved)
	}
	found := make([]*migratedv1.HostVM, 0, len(view.GetVms()))
	for _, vm := range view.GetVms() {
		found = append(found, &migratedv1.HostVM{Vm: vm.GetVm(), Name: vm.GetName(), Pid: vm.GetPid()})
	}
	for _, group := range e.spec.GetApart() {
		e.placer.keepApart(addresses(found, group.GetVms()))
	}
}

// finish ends the evacuation. VMs that were started meanwhile are added to it, because the host is not empty.
func (e *evacuation) finish(ctx context.Context) {
	var late []*migratedv1.HostVM
	var unknown error
	if len(e.spec.GetVms()) == 0 {
		all, err := e.allVMs(ctx)
		if unknown = err; err == nil {
			late = slices.DeleteFunc(all, e.isKnown)
		}
	}
	e.update(func(view *migratedv1.Evacuation) {
		if unknown != nil {
			view.Error = migration.Describe(migration.WithRemedy(
				fmt.Errorf("whether VMs came to this host after the plan was made is not known: %w", unknown),
				"see which VMs there are with 'migrated vms'"))
		}
		for _, vm := range late {
			view.Vms = append(view.Vms, &migratedv1.EvacuatedVM{
				Vm: vm.GetVm(), Name: vm.GetName(), Pid: vm.GetPid(), Location: migratedv1.Location_LOCATION_SOURCE,
				State: migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_CANNOT_MOVE,
				Error: migration.Describe(migration.WithRemedy(errors.New("it came to this host after the plan was made"),
					"evacuate the host again")),
			})
		}
		state := migratedv1.EvacuationState_EVACUATION_STATE_DONE
		if view.GetState() == migratedv1.EvacuationState_EVACUATION_STATE_CANCELLING {
			state = migratedv1.EvacuationState_EVACUATION_STATE_CANCELLED
		}
		end(view, state)
	})
}

// isKnown says whether a VM of this host is one of the evacuation's, or one that is not to be moved.
func (e *evacuation) isKnown(vm *migratedv1.HostVM) bool {
	view, _ := e.Snapshot()
	stays := slices.ContainsFunc(e.spec.GetExcept(), func(name string) bool { return isNamed(vm, name) })
	return vm.GetElsewhere() || stays || slices.ContainsFunc(view.GetVms(), func(v *migratedv1.EvacuatedVM) bool {
		return v.GetPid() == vm.GetPid()
	})
}
