// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/migrated-vm/migrated/internal/qmp"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// Run runs the VM: it is the second step of the commit. It is idempotent. ErrNotRun promises that the VM never runs
// here. After any other error the VM may have run.
func (d *Destination) Run(ctx context.Context, request *migratedv1.RunRequest) (*migratedv1.RunResponse, error) {
	arrived := time.Now()
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.run(ctx, request, arrived)
}

// run does Run's work. The caller holds mu.
func (d *Destination) run(
	ctx context.Context, request *migratedv1.RunRequest, arrived time.Time,
) (*migratedv1.RunResponse, error) {
	again := d.toldToRun() // by an earlier Run
	switch step := d.step(); {
	case again:
		if answer := d.runAnswer(); answer != nil {
			return answer, nil
		} // else it is unknown whether QEMU got the command
	case step == givenUp:
		return nil, fmt.Errorf("%w: %w", ErrNotRun, d.reason)
	case step == doomed:
		return nil, fmt.Errorf("%w: %w", ErrNotRun, errDoomed)
	case step != loaded:
		return nil, d.outOfOrder(loaded)
	}
	if d.vm == nil {
		if over := context.Cause(d.ctx); over != nil {
			return nil, fmt.Errorf("the VM may have run on the destination: %w", over)
		}
		return nil, fmt.Errorf("the destination QEMU does not answer yet: %w", errAskAgain)
	}
	select {
	case <-d.vm.QMP.Done():
		if d.daemon.Err() != nil { // this daemon closed the connection
			return nil, fmt.Errorf("the destination's daemon ends: %w", errAskAgain)
		}
		switch {
		case again && (d.ctx.Err() != nil || d.vm.Ended()): // the migration is over, or soon will be
			gone := fmt.Errorf("the destination QEMU was told to run the VM, and is gone: %w", d.explain(d.vm.QMP.Err()))
			return nil, withReason(gone, migratedv1.Reason_REASON_DESTINATION_QEMU_ENDED)
		case again:
			if err := d.reattach(ctx); err != nil {
				return nil, fmt.Errorf("the destination QEMU was told to run the VM, and its monitor is lost: %w: %w",
					err, errAskAgain)
			}
		default: // QEMU was never told to run the VM, and cannot be told any more
			d.giveUp(fmt.Errorf("the destination QEMU's monitor was lost before it ran the VM: %w", d.explain(d.vm.QMP.Err())))
			return nil, fmt.Errorf("%w: %w", ErrNotRun, d.reason)
		}
	default:
	}
	ctx, cancel := context.WithTimeout(ctx, resumeTimeout/2) // so that the source gets an answer before it asks again
	defer cancel()
	testPoint("destination-go")
	if !d.markToldToRun() { // pump gives the migration up
		return nil, fmt.Errorf("%w: %w", ErrNotRun, errDoomed)
	}
	// From here on the VM may have run, whatever QEMU answers: it must not be given up.
	testPoint("destination-told")
	told := time.Now()
	resumed := told
	var announced func()
	if d.domain == "" { // libvirt passes on one command at a time, and cont must not wait
		announced = d.announce(ctx)
	}
	if request.GetResume() {
		at, err := d.vm.Cont(ctx)
		if err != nil {
			return nil, d.contFailed(again, err)
		}
		resumed = at
	}
	if announced == nil {
		announced = d.announce(ctx)
	}
	go announced() // a paused VM sends the announcements when it is continued
	testPoint("destination-runs")
	d.releaseGC()
	d.engine.StartSweep()
	answer := &migratedv1.RunResponse{
		ResumeTime: durationpb.New(max(0, resumed.Sub(arrived))), ServeTime: durationpb.New(time.Since(arrived)),
	}
	downtime := request.GetStoppedFor().AsDuration() + answer.GetResumeTime().AsDuration()
	d.meter.switched(resumed, downtime)
	d.markRunning(resumed, !request.GetResume(), answer, downtime)
	if !request.GetResume() {
		go d.followContinued(d.vm)
	}
	d.update(func(m *migratedv1.Migration) {
		m.State, m.Location = migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_ACTIVE,
			migratedv1.Location_LOCATION_DESTINATION
		m.SwitchTime, m.Overdue = timestamppb.New(resumed), m.Overdue || d.deadlinePassed()
	})
	early := d.engine.Stats() // mostly faults of loading: the VM has just started
	d.noteRun(early, resumed.Sub(told))
	d.log.Info("the VM runs", "stopped_for", downtime, "faults", early.Faults, "slowest_fault", early.FaultMax)
	testPoint("destination-running")
	return answer, nil
}

// announce has QEMU announce the VM's network cards as soon as the VM runs. For a paused VM, QEMU does it when the VM
// is continued. The returned function waits for QEMU's answer; nobody else has to.
//
// By itself, QEMU would announce them at the end of loading. Then the VM may still go on at the source, and switches
// would send its traffic here. Once the VM runs, QEMU's main loop may soon wait for a page and not read the command.
func (d *Destination) announce(ctx context.Context) (answered func()) {
	wait, err := d.vm.BeginAnnouncing(ctx)
	return func() {
		if err == nil {
			ctx, cancel := context.WithTimeout(d.daemon, resumeTimeout)
			defer cancel()
			err = wait(ctx)
		}
		if err != nil {
			d.log.Warn("the VM's network cards were not announced; the network finds out when the VM sends", "error", err)
		}
	}
}

// reattach opens a new monitor of a QEMU that lives and whose monitor was lost, for example when libvirt's daemon
// ended. Only QEMU knows whether it got the last command. The caller holds mu.
func (d *Destination) reattach(ctx context.Context) error {
	vm, err := attachAgain(ctx, d.qmpPath(), d.vm)
	if err != nil {
		return fmt.Errorf("attach to the destination QEMU: %w", err)
	}
	vm.PutBack(d.vm.Changed())
	d.replaced = append(d.replaced, d.vm) // other goroutines wait for its process
	d.vm = vm
	go d.watchQEMU(vm)
	return nil
}

// contFailed finds out whether the VM may have run after cont failed. Only one case proves that it did not execute a
// single instruction: QEMU refused its first cont, and still answers that the VM is stopped.
func (d *Destination) contFailed(told bool, cause error) error {
	d.releaseGC()
	ctx, cancel := context.WithTimeout(d.ctx, attachTimeout)
	defer cancel()
	var refusal *qmp.Error
	if !told && errors.As(cause, &refusal) {
		if status, err := d.vm.Status(ctx); err == nil && status != "running" {
			d.unmarkToldToRun()
			d.giveUp(fmt.Errorf("the destination QEMU refused to run the VM: %w", cause))
			return fmt.Errorf("%w: %w", ErrNotRun, d.reason)
		}
	}
	err := fmt.Errorf("continue the destination VM: %w", d.explain(cause))
	if refusal == nil && (d.vm.QMP.Err() == nil || d.daemon.Err() != nil || !d.vm.Ended()) {
		// The outcome is open, so the source asks again. Either QEMU hangs and may obey later, or this daemon ends
		// and the next one knows more, or only the monitor is lost and QEMU answers on a new one.
		return fmt.Errorf("%w: %w", err, errAskAgain)
	}
	return err
}
