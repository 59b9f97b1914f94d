// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/pkg/uffd/inject"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

const (
	// closeTimeout bounds closing QEMU's copy of the descriptor.
	closeTimeout = 10 * time.Second
	killTimeout  = 10 * time.Second
)

// end says how the migration ended and lets go of what it held.
func (d *Destination) end(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err == nil && d.vm != nil && d.vm.QMP.Err() != nil && d.exits(d.vm) {
		// A VM that ended with its last page is not yet told to the source, which still has its memory.
		err = d.qemuEnded(d.vm)
	}
	how := d.endingHere(err)
	switch {
	case err != nil && how != nil:
		d.ended(how)
	case err == nil:
		d.complete()
	case d.phase == running && errors.Is(err, errAbandoned):
		d.abandoned()
	case d.phase == running && d.daemon.Err() != nil:
		// No failure, and the source must not take it for one: the VM runs here.
		d.log.Warn("left for the next start of this daemon", "reason", err)
		d.leave = true
		d.paused(withRemedy(err, "start the destination's daemon again: it goes on with the migration"))
	case d.phase == running:
		// The descriptor in QEMU stays open: what needs a missing page waits, and
		// nothing ever reads a zero in its place.
		d.log.Error("failed after the switch", "error", err)
		d.leave = true
		d.fail(migratedv1.MigrationState_MIGRATION_STATE_FAILED, d.explain(err), d.whereFailed())
	default:
		d.giveUp(err)
	}
}

// complete closes QEMU's copy of the descriptor: all memory is here.
func (d *Destination) complete() {
	d.kept.header().filled.Store(1)
	d.persist()
	d.closeRemote(d.taken.Pid, d.taken.RemoteFD)
	d.update(func(m *migratedv1.Migration) {
		m.State, m.Location = migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, migratedv1.Location_LOCATION_DESTINATION
		m.Error = nil
		m.Progress = d.meter.progress(d.engine.Stats())
	})
	d.warnOfOthers(d.engine.Stats())
	d.log.Info("completed", "residency", d.meter.residency(d.engine.Stats()))
	reached("destination-completed")
}

// closeRemote closes QEMU's copy of the descriptor.
func (d *Destination) closeRemote(pid, fd int) {
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	if err := inject.CloseRemote(ctx, pid, fd); err != nil {
		d.log.Warn("QEMU keeps a userfaultfd that nothing is registered with any more", "error", err)
	}
}

// giveUp ends a destination that has not run the VM, for good: its QEMU is
// gone when it returns. The caller holds mu.
func (d *Destination) giveUp(reason error) {
	if d.phase == givenUp || d.phase == running {
		return
	}
	d.phase, d.reason = givenUp, reason
	d.releaseGC()
	// A source that was about to say go hears from the next daemon that the VM never ran here.
	d.leave = d.daemon.Err() != nil
	d.log.Warn("gave up", "reason", reason)
	reached("destination-giving-up")
	d.cancel(reason)
	d.endQEMU()
	d.fail(migratedv1.MigrationState_MIGRATION_STATE_FAILED, reason, neverRun)
	if !d.pumping { // else pump does, when the engine has returned
		d.release()
		close(d.done)
	}
}

// endQEMU makes sure that a QEMU that may have loaded the VM's device state
// can't run it. It is of no other use, also where an orchestrator started it.
func (d *Destination) endQEMU() {
	ctx, cancel := context.WithTimeout(context.Background(), killTimeout)
	defer cancel()
	switch {
	case d.process != nil:
		if err := d.process.Kill(ctx); err != nil {
			d.log.Error("cannot end the destination QEMU", "error", err)
		}
	case d.vm != nil:
		if err := d.vm.Quit(ctx); err != nil {
			d.log.Error("cannot end the destination QEMU", "error", err)
		}
	case d.left != (qemu.Identity{}):
		if err := d.left.Kill(ctx); err != nil {
			d.log.Error("cannot end the destination QEMU", "error", err)
		}
	}
}

// release closes this daemon's descriptors; QEMU and its own copies stay.
func (d *Destination) release() {
	if err := d.reserve.release(); err != nil {
		d.log.Warn("give back what was set aside for the VM", "error", err)
	}
	d.early.close()
	if !d.leave { // else that QEMU is no whole VM
		claimed.give(d.claim)
	}
	if d.taken != nil {
		if err := d.taken.UFFD.Close(); err != nil {
			d.log.Warn("close the userfaultfd", "error", err)
		}
	}
	d.closeFiles()
	for _, vm := range append(d.replaced, d.vm) {
		if vm == nil {
			continue
		}
		if err := vm.Close(); err != nil {
			d.log.Warn("disconnect from QEMU", "error", err)
		}
	}
	d.limitMu.Lock()
	defer d.limitMu.Unlock()
	d.released = true
	if d.kept == nil {
		return
	}
	end := d.kept.forget
	switch {
	case d.leave:
		end = d.kept.close
	case d.kept.header().filled.Load() != 0 && d.kept.header().settled.Load() == 0 && d.owesSettings():
		end = d.kept.close
		defer d.putBackLater()
	case d.kept.header().filled.Load() != 0, d.kept.header().ended.Load() != 0:
		d.kept.header().settled.Store(1)
		end = d.kept.close
		defer d.word.keep(d.Forget) // when the mapping is gone
	}
	if err := end(); err != nil {
		d.log.Warn("what was kept for a restarted daemon", "error", err)
	}
}

// wordKept is how long a daemon that is started again can still say of a migration that it was completed. The source asks, and
// would not know what became of its VM, if both daemons died before it had heard.
const wordKept = time.Minute

// word is that of a completed migration: its files.
type word struct {
	mu    sync.Mutex
	timer *time.Timer
	over  bool
}

// keep has it forgotten when its time is over.
func (w *word) keep(forget func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.timer = time.AfterFunc(wordKept, forget)
}

// Forget removes what is kept of a migration that was completed, before another of the same id is made.
func (d *Destination) Forget() {
	d.word.mu.Lock()
	defer d.word.mu.Unlock()
	if d.word.timer == nil || d.word.over {
		return
	}
	d.word.over = true // a timer that fires late must not remove what is another's by then
	d.word.timer.Stop()
	if err := d.kept.forget(); err != nil {
		d.log.Warn("what was kept of a completed migration", "error", err)
	}
}

// watchQEMU ends the migration at once when QEMU dies. After the switch a QEMU whose monitor is lost has not: libvirt's
// daemon has, say. Its VM goes on, and so do its pages. Before the switch it cannot be told to run the VM any more.
func (d *Destination) watchQEMU(vm *qemu.VM) {
	select {
	case <-d.ctx.Done():
		return
	case <-vm.QMP.Done():
	}
	if d.ctx.Err() == nil && !d.decide(cannotRun) && !d.exits(vm) {
		d.log.Warn("QEMU's monitor is lost, and QEMU lives", "error", vm.QMP.Err())
		if vm.WaitExit(d.ctx) != nil {
			return
		}
	}
	if d.ctx.Err() == nil {
		d.cancel(d.qemuEnded(vm))
	}
}

// exits waits for a QEMU whose monitor is lost, and says whether its process has ended.
func (d *Destination) exits(vm *qemu.VM) bool {
	ctx, cancel := context.WithTimeout(d.ctx, exitTimeout)
	defer cancel()
	return vm.WaitExit(ctx) == nil
}

// qemuEnded says that QEMU has, in its own words.
func (d *Destination) qemuEnded(vm *qemu.VM) error {
	gone := vm.QMP.Err()
	if gone == nil { // it was connected to at its last moment
		gone = errors.New("its process has ended")
	}
	return withReason(fmt.Errorf("the destination QEMU is gone: %w", d.explain(gone)),
		migratedv1.Reason_REASON_DESTINATION_QEMU_ENDED)
}
