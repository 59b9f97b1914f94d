// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/migrated-vm/migrated/internal/qmp"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// Run runs the VM: the second step of the commit. It is idempotent. ErrNotRun
// is a promise for good; any other error leaves open whether the VM ran.
func (d *Destination) Run(ctx context.Context, request *migratedv1.RunRequest) (*migratedv1.RunResponse, error) {
	arrived := time.Now()
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.run(ctx, request, arrived)
}

// run is Run of a caller that holds the lock.
func (d *Destination) run(
	ctx context.Context, request *migratedv1.RunRequest, arrived time.Time,
) (*migratedv1.RunResponse, error) {
	switch {
	case d.phase == running && d.answer != nil:
		return d.answer, nil
	case d.phase == running: // it is not known whether QEMU heard what it was told
	case d.phase == givenUp:
		return nil, fmt.Errorf("%w: %w", ErrNotRun, d.reason)
	default:
		if err := d.expect(loaded); err != nil {
			return nil, err
		}
	}
	again := d.phase == running // it was told before
	if d.vm == nil {
		if over := context.Cause(d.ctx); over != nil {
			return nil, fmt.Errorf("the VM may have run here: %w", over)
		}
		return nil, fmt.Errorf("the destination QEMU does not answer yet: %w", errAskAgain)
	}
	select {
	case <-d.vm.QMP.Done():
		if d.daemon.Err() != nil { // it was this daemon that hung up
			return nil, fmt.Errorf("the destination's daemon ends: %w", errAskAgain)
		}
		switch {
		case again && (d.ctx.Err() != nil || d.vm.Ended()): // it is over, or will be
			gone := fmt.Errorf("the destination QEMU was told to run the VM, and is gone: %w", d.explain(d.vm.QMP.Err()))
			return nil, withReason(gone, migratedv1.Reason_REASON_DESTINATION_QEMU_ENDED)
		case again:
			if err := d.attachAnew(ctx); err != nil {
				return nil, fmt.Errorf("the destination QEMU was told to run the VM, and its monitor is lost: %w: %w",
					err, errAskAgain)
			}
		default: // it can't be told any more to run, and never was
			d.giveUp(fmt.Errorf("the destination QEMU's monitor was lost before it ran the VM: %w", d.explain(d.vm.QMP.Err())))
			return nil, fmt.Errorf("%w: %w", ErrNotRun, d.reason)
		}
	default:
	}
	ctx, cancel := context.WithTimeout(ctx, resumeTimeout/2) // the source hears before it asks again
	defer cancel()
	reached("destination-go")
	if !d.decide(toldToRun) {
		// The pump gives it up.
		return nil, fmt.Errorf("%w: the source's pages cannot be had any more, or QEMU not be told", ErrNotRun)
	}
	// From here on it may have run, whatever QEMU answers: nobody gives it up.
	d.kept.header().toldToRun.Store(1)
	d.phase = running
	reached("destination-told")
	told := time.Now()
	resumed := told
	var announced func()
	if d.domain == "" { // libvirt passes on one command after the other, and cont is not to wait
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
	go announced() // of a paused VM when somebody continues it
	reached("destination-runs")
	d.releaseGC()
	d.engine.StartSweep()
	d.answer = &migratedv1.RunResponse{
		ResumeTime: durationpb.New(max(0, resumed.Sub(arrived))), ServeTime: durationpb.New(time.Since(arrived)),
	}
	downtime := request.GetStoppedFor().AsDuration() + d.answer.GetResumeTime().AsDuration()
	d.meter.switched(resumed, downtime)
	if !request.GetResume() {
		d.kept.header().paused.Store(1)
	}
	d.kept.running(resumed, d.answer.GetResumeTime().AsDuration(), downtime)
	d.update(func(m *migratedv1.Migration) {
		m.State, m.Location = migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_ACTIVE, migratedv1.Location_LOCATION_DESTINATION
	})
	early := d.engine.Stats() // little but what loading met: the VM has hardly begun
	d.noteRun(early, resumed.Sub(told))
	d.log.Info("the VM runs", "stopped_for", downtime, "faults", early.Faults, "slowest_fault", early.FaultMax)
	reached("destination-running")
	return d.answer, nil
}

// announce has the VM's network cards say where they are as soon as it runs. QEMU by itself would do it when it has loaded,
// when the VM may yet go on at the source: then switches would look for it here. And when the VM runs, QEMU's main loop
// may soon wait for a page, and not hear of it. Of a paused VM QEMU keeps it until somebody continues that. answered
// waits for QEMU's answer; nobody else has to.
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

// attachAnew connects again to a QEMU that lives and whose monitor is lost, as libvirt's are with its daemon: whether
// it heard what it was told, it alone knows. The caller holds mu.
func (d *Destination) attachAnew(ctx context.Context) error {
	vm, err := attachSame(ctx, d.qmpPath(), d.vm)
	if err != nil {
		return fmt.Errorf("attach to the destination QEMU: %w", err)
	}
	vm.PutBack(d.vm.Changed())
	d.replaced = append(d.replaced, d.vm) // others wait for its process
	d.vm = vm
	go d.watchQEMU(vm)
	return nil
}

// contFailed finds out whether a VM that QEMU was told to continue may have
// run. Only a QEMU that refused when it was told for the first time, and still
// answers that the VM is stopped, proves that not one instruction did.
func (d *Destination) contFailed(told bool, cause error) error {
	d.releaseGC()
	ctx, cancel := context.WithTimeout(d.ctx, attachTimeout)
	defer cancel()
	var refusal *qmp.Error
	if !told && errors.As(cause, &refusal) {
		if status, err := d.vm.Status(ctx); err == nil && status != "running" {
			d.phase = loaded
			d.giveUp(fmt.Errorf("the destination QEMU refused to run the VM: %w", cause))
			return fmt.Errorf("%w: %w", ErrNotRun, d.reason)
		}
	}
	err := fmt.Errorf("continue the destination VM: %w", d.explain(cause))
	if refusal == nil && (d.vm.QMP.Err() == nil || d.daemon.Err() != nil || !d.vm.Ended()) {
		// QEMU hangs, and may do later what it was told; or this daemon ends, and the next one knows more; or the monitor is
		// lost alone, and QEMU says more by another one.
		return fmt.Errorf("%w: %w", err, errAskAgain)
	}
	return err
}
