// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/process"
	"github.com/migrated-vm/migrated/pkg/postcopy"
	"github.com/migrated-vm/migrated/pkg/uffd/inject"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

const (
	// closeTimeout bounds closing QEMU's copy of the userfaultfd.
	closeTimeout = 10 * time.Second
	killTimeout  = 10 * time.Second
)

// end records how the migration ended and handles what is left of it.
func (d *Destination) end(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err == nil && d.vm != nil && d.vm.QMP.Err() != nil && d.hasExited(d.vm) {
		// The VM ended when its last page came. The source does not know yet and still has its memory.
		err = d.qemuEndedError(d.vm)
	}
	how := d.findEnding(err)
	told := d.toldToRun()
	switch {
	case err != nil && how != nil:
		d.noteEnded(how)
	case err == nil && told:
		d.complete()
	case told && errors.Is(err, errAbandoned):
		d.abandon()
	case told && d.daemon.Err() != nil:
		// This is no failure, and the source must not take it for one: the VM runs here.
		d.log.Warn("left for the next start of this daemon", "reason", err)
		d.paused(withRemedy(err, "start the destination's daemon again: it goes on with the migration"))
	case told:
		// QEMU's userfaultfd stays open: a thread that needs a missing page waits and never reads a zero instead.
		d.log.Error("failed after the switch", "error", err)
		d.awaitExit(err)
		d.fail(migratedv1.MigrationState_MIGRATION_STATE_FAILED, d.explain(err), d.whereFailed())
	case err == nil:
		d.giveUp(errors.New("all memory arrived before the source told the destination to run the VM"))
	default:
		d.giveUp(err)
	}
}

// awaitExit waits up to exitTimeout for the end of a QEMU that is about to end, as err or its monitor says: else the VM
// would be reported as one that is still here.
func (d *Destination) awaitExit(err error) {
	gone := errors.Is(err, postcopy.ErrProcessGone)
	ctx, cancel := context.WithTimeout(context.Background(), exitTimeout)
	defer cancel()
	switch {
	case d.vm != nil && (gone || d.vm.QMP.Err() != nil):
		err = d.vm.WaitExit(ctx)
	case d.vm == nil && gone && d.exit != nil:
		_, err = d.exit.Status(ctx)
	default:
		return
	}
	if err != nil {
		d.log.Warn("the destination QEMU has not ended in time", "error", err)
	}
}

// complete ends a migration whose memory is all here: it closes QEMU's copy of the userfaultfd.
func (d *Destination) complete() {
	d.markFilled()
	d.persist()
	d.closeRemote(d.taken.Pid, d.taken.RemoteFD)
	d.update(func(m *migratedv1.Migration) {
		m.State, m.Location = migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, migratedv1.Location_LOCATION_DESTINATION
		m.Error = nil
		m.Progress = d.meter.progress(d.engine.Stats())
	})
	d.warnOfOtherProcesses(d.engine.Stats())
	d.log.Info("completed", "residency", d.meter.residency(d.engine.Stats()))
	testPoint("destination-completed")
}

// closeRemote closes QEMU's copy of the userfaultfd.
func (d *Destination) closeRemote(pid, fd int) {
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	if err := inject.CloseRemote(ctx, pid, fd); err != nil {
		d.log.Warn("cannot close QEMU's userfaultfd, with which nothing is registered any more", "error", err)
	}
}

// giveUp permanently ends a destination that has not run the VM. Its QEMU is gone when giveUp returns. The caller
// holds mu.
func (d *Destination) giveUp(reason error) {
	if !d.moveTo(givenUp) { // given up before, or QEMU was told to run the VM
		return
	}
	d.reason = reason
	d.releaseGC()
	d.log.Warn("gave up", "reason", reason)
	testPoint("destination-giving-up")
	d.cancel(reason)
	d.endQEMU()
	d.fail(migratedv1.MigrationState_MIGRATION_STATE_FAILED, reason, whereNeverRun)
	if !d.pumpStarted { // else pump calls finish when the engine has returned
		d.finish()
	}
}

// finish ends the destination's life: it releases everything and closes done. The caller holds mu.
func (d *Destination) finish() {
	d.cancel(nil)
	d.release()
	close(d.done)
}

// finishAlone is finish for a goroutine that does not hold mu. It cancels first, because a call that holds mu may wait
// for something that d.ctx ends.
func (d *Destination) finishAlone() {
	d.cancel(nil)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.finish()
}

// endQEMU ends QEMU. A QEMU that may have loaded the VM's device state must never run it, and is of no other use,
// also if an orchestrator started it. A QEMU that an orchestrator started and that may be another VM's is left alone.
func (d *Destination) endQEMU() {
	ctx, cancel := context.WithTimeout(context.Background(), killTimeout)
	defer cancel()
	switch {
	case d.foreign:
		d.log.Info("the destination QEMU is left as it was", "pid", d.vm.Pid)
	case d.process != nil:
		if err := d.process.Kill(ctx); err != nil {
			d.log.Error("cannot end the destination QEMU", "error", err)
		}
	case d.vm != nil:
		if err := d.vm.Quit(ctx); err != nil {
			d.log.Error("cannot end the destination QEMU", "error", err)
		}
	case d.left != (process.Identity{}):
		if err := d.left.Kill(ctx); err != nil {
			d.log.Error("cannot end the destination QEMU", "error", err)
		}
	}
}

// resumable says whether the files stay for a restarted daemon. They also stay if the VM was not told to run and this
// daemon ends: the next daemon then answers a source that sends Run that the VM never ran here.
func (d *Destination) resumable() bool {
	return d.step() == running || d.step() == givenUp && d.daemon.Err() != nil
}

// release closes this daemon's descriptors. QEMU and its own copies stay. The caller holds mu.
func (d *Destination) release() {
	if err := d.reserve.release(); err != nil {
		d.log.Warn("cannot release the memory reserved for the VM", "error", err)
	}
	d.early.close()
	if d.exit != nil {
		_ = d.exit.Close() // it was opened only to wait
	}
	resumable := d.resumable() // once: the daemon may be stopped meanwhile
	if !resumable {            // else that QEMU still lacks memory and must not be migrated
		qemuClaims.unclaim(d.claim)
	}
	if d.taken != nil {
		if err := d.taken.UFFD.Close(); err != nil {
			d.log.Warn("cannot close the userfaultfd", "error", err)
		}
	}
	if err := d.engines.close(); err != nil {
		d.log.Warn("cannot free memory of the engine", "error", err)
	}
	d.closeFiles()
	for _, vm := range append(d.replaced, d.vm) {
		if vm == nil {
			continue
		}
		if err := vm.Close(); err != nil {
			d.log.Warn("cannot disconnect from QEMU", "error", err)
		}
	}
	d.limitMu.Lock()
	defer d.limitMu.Unlock()
	d.keepMemory()
	d.released = true
	if d.kept == nil {
		return
	}
	end := d.kept.remove
	closed := &d.kept.header().closed
	switch step := d.step(); {
	case resumable:
		end = d.kept.close
	case step == filled && closed.Load() == 0 && d.mustPutBackSettings():
		end = d.kept.close
		defer d.putBackLater()
	case step == filled, step == ended:
		closed.Store(1)
		end = d.kept.close
		defer d.retention.begin(d.Forget) // after end has unmapped the file
	}
	if err := end(); err != nil {
		d.log.Warn("cannot close or remove the files kept for a restart", "error", err)
	}
}

// retentionTime is how long the files of a completed migration stay. A restarted daemon then still answers that it
// completed. Without the files, a source whose daemon also died would not learn what became of its VM.
const retentionTime = time.Minute

// A retention keeps the files of an ended migration for retentionTime.
type retention struct {
	mu    sync.Mutex
	timer *time.Timer // nil: it has not started
	over  bool        // the files were removed
}

// begin starts the timer that calls forget.
func (r *retention) begin(forget func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.timer = time.AfterFunc(retentionTime, forget)
}

// Forget removes the files of a completed migration. The daemon calls it before it creates another migration with the
// same id.
func (d *Destination) Forget() {
	d.retention.mu.Lock()
	defer d.retention.mu.Unlock()
	if d.retention.timer == nil || d.retention.over {
		return
	}
	d.retention.over = true // a late timer must not remove the files of a new migration
	d.retention.timer.Stop()
	if err := d.kept.remove(); err != nil {
		d.log.Warn("cannot remove the files kept of a completed migration", "error", err)
	}
}

// watchQEMU ends the migration as soon as QEMU dies. A lost monitor alone is treated by step:
//   - After the switch, QEMU may live on without its monitor, for example when libvirt's daemon ended.
//     The VM and its pages go on.
//   - Before the switch, QEMU can no longer be told to run the VM, so the migration ends.
func (d *Destination) watchQEMU(vm *qemu.VM) {
	select {
	case <-d.ctx.Done():
		return
	case <-vm.QMP.Done():
	}
	if d.ctx.Err() == nil && !d.doom() && !d.hasExited(vm) {
		d.log.Warn("QEMU's monitor is lost, and QEMU lives", "error", vm.QMP.Err())
		if vm.WaitExit(d.ctx) != nil {
			return
		}
	}
	if d.ctx.Err() == nil {
		d.cancel(d.qemuEndedError(vm))
	}
}

// hasExited waits up to exitTimeout for the process of a QEMU whose monitor is lost, and reports whether it ended.
func (d *Destination) hasExited(vm *qemu.VM) bool {
	ctx, cancel := context.WithTimeout(d.ctx, exitTimeout)
	defer cancel()
	return vm.WaitExit(ctx) == nil
}

// qemuEndedError returns the error that QEMU has ended, with QEMU's own words.
func (d *Destination) qemuEndedError(vm *qemu.VM) error {
	gone := vm.QMP.Err()
	if gone == nil { // the process ended just after the connection was made
		gone = errors.New("its process has ended")
	}
	return withReason(fmt.Errorf("the destination QEMU is gone: %w", d.explain(gone)),
		migratedv1.Reason_REASON_DESTINATION_QEMU_ENDED)
}
