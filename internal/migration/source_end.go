// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qmp"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// complete ends the source's QEMU, whose memory is all at the destination.
func (s *Source) complete() {
	testPoint("source-last-page")
	s.endSourceVM(migratedv1.Reason_REASON_UNSPECIFIED, s.showCompleted)
	s.log.Info("completed")
}

// showCompleted shows the migration as completed.
func (s *Source) showCompleted() {
	s.update(func(m *migratedv1.Migration) {
		m.State = migratedv1.MigrationState_MIGRATION_STATE_COMPLETED
		m.Location = migratedv1.Location_LOCATION_DESTINATION
	})
}

// reportAndForget stores the report of a migration that is shown as over, and then removes its record. A restarted
// daemon finds at least one of the two, and so knows where the VM is.
func (s *Source) reportAndForget() {
	s.report()
	s.removeRecord()
	testPoint("source-forgotten")
}

// report stores the report of a migration that is shown as over.
func (s *Source) report() {
	if s.cfg.Report != nil {
		s.cfg.Report(s)
	}
	testPoint("source-reported")
}

// removeRecord removes the record, and logs a failure.
func (s *Source) removeRecord() {
	if err := s.cfg.Records.Remove(s.cfg.ID); err != nil {
		s.log.Warn("cannot remove the migration's record", "error", err)
	}
}

// backOut ends a migration that did not hand the VM over: the VM goes on here. ctx may have ended; backOut uses only
// its values.
func (s *Source) backOut(ctx context.Context, reason error) {
	if s.export != nil {
		s.export.Revoke() // no page is sent from here on
	}
	note := ""
	switch {
	case s.qemuEnded():
		s.removeRecord()
	case s.stopTried():
		note, _ = s.continueVM()
	}
	s.undoKeepMemory()
	s.noteSteps(&migratedv1.DowntimeSteps{})
	s.tellToGiveUp(ctx, reason) // not urgent: the VM runs again, or never stopped
	state := migratedv1.MigrationState_MIGRATION_STATE_FAILED
	if errors.Is(reason, ErrCancelled) {
		state = migratedv1.MigrationState_MIGRATION_STATE_CANCELLED
	}
	where := s.whereBeforeCommit(note)
	s.log.Warn("gave up", "state", state, "reason", reason, "where", where.words)
	s.fail(state, reason, where)
}

// tellToGiveUp tells the destination to end its QEMU. If the message does not arrive, the destination does so by
// itself.
func (s *Source) tellToGiveUp(ctx context.Context, reason error) {
	if s.peer == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), abortTimeout)
	defer cancel()
	_, err := s.peer.AbortIncoming(ctx, &migratedv1.AbortIncomingRequest{Id: s.cfg.ID, Reason: reason.Error()})
	if err != nil && status.Code(err) != codes.NotFound {
		s.log.Warn("could not tell the destination to give up; it does so by itself", "error", err)
	}
}

// continueVM restores the VM to what it was before it was stopped. The caller appends note, which is for the operator,
// to where the VM is. The error says why the VM is not what it was.
func (s *Source) continueVM() (note string, err error) {
	if s.endGuard != nil {
		s.endGuard()
	}
	testPoint("source-backing-out")
	s.awaitMonitor()
	ctx, cancel := context.WithTimeout(context.Background(), resumeTimeout)
	defer cancel()
	vm := s.monitor()
	if s.takenUp && s.protocol < savesDevices {
		if err := vm.CancelMigrate(ctx); err != nil {
			s.log.Warn("cancel QEMU's own migration", "error", err)
		}
	}
	s.removeContLock(ctx, vm)
	if !s.wasRunning {
		return s.leavePaused(ctx)
	}
	if err = s.contRepeatedly(ctx, vm); err != nil {
		s.log.Error("cannot continue the VM", "error", err)
		// The record stays, so that a restarted daemon tries again.
		return fmt.Sprintf("; it could not be continued (%v): continue it with QMP 'cont' on %s, "+
				"after blockdev-del of the node %s if it has that", err, s.cfg.Spec.GetVm(), qemu.ContLockNode),
			fmt.Errorf("continue the VM: %w", err)
	}
	testPoint("source-continued")
	s.removeRecord()
	return "", nil
}

// contRepeatedly continues the VM. It tries until ctx ends, as long as QEMU answers: what QEMU refuses it for may pass,
// such as a lock that another program has on an image for a while. The VM stands still meanwhile.
func (s *Source) contRepeatedly(ctx context.Context, vm *qemu.VM) error {
	for {
		_, err := vm.Cont(ctx)
		if !errors.Is(err, qmp.ErrGeneric) {
			return err
		}
		s.log.Warn("QEMU does not continue the VM yet", "error", err)
		if sleep(ctx, contPause) != nil {
			return err
		}
	}
}

// leavePaused takes back the disks of a VM that was paused before, and leaves it paused.
func (s *Source) leavePaused(ctx context.Context) (note string, err error) {
	if s.gaveUpDisks || s.takenUp {
		able, err := s.monitor().ActivateDisks(ctx)
		switch {
		case err != nil:
			s.log.Error("cannot take the VM's disks back", "error", err)
			return fmt.Sprintf(", but QEMU could not take its disks back (%v); it tries again when it is continued", err),
				fmt.Errorf("take the VM's disks back: %w", err)
		case !able:
			s.removeRecord()
			return "; this QEMU takes its disks back when the VM is continued", nil
		}
	}
	s.removeRecord()
	return "", nil
}

// monitor returns the connection to QEMU: the second one if the first was lost.
func (s *Source) monitor() *qemu.VM {
	if s.reconnected != nil {
		return s.reconnected
	}
	return s.vm
}

// awaitMonitor connects to QEMU again if the monitor connection was lost while QEMU is alive. libvirt's connections are
// lost with its daemon, for example. The VM stands still until then. awaitMonitor stops when QEMU or this daemon ends;
// the next daemon takes up the record.
func (s *Source) awaitMonitor() {
	for s.vm.QMP.Err() != nil && !s.qemuEnded() {
		vm, err := attachAgain(s.daemonCtx, s.cfg.Spec.GetVm(), s.vm)
		if err == nil {
			vm.PutBack(s.vm.Changed())
			s.reconnected = vm
			return
		}
		s.log.Warn("the VM's QEMU does not answer yet", "error", err)
		s.fail(migratedv1.MigrationState_MIGRATION_STATE_DEVICE,
			withRemedy(fmt.Errorf("the connection to the VM's QEMU was lost, and cannot be made again: %w", err),
				"see that "+s.cfg.Spec.GetVm()+" can be connected to (start libvirt's daemon, if it is libvirt's): "+
					"the VM goes on then"),
			whereabouts{migratedv1.Location_LOCATION_UNKNOWN, "the VM was about to stop on the source"})
		if sleep(s.daemonCtx, time.Second) != nil {
			return
		}
	}
}

// release frees everything that the source holds. It does not touch the VM itself.
func (s *Source) release() {
	s.earlyState.close()
	s.closeContLock()
	qemuClaims.unclaim(s.claim)
	if s.export != nil {
		s.export.Withdraw()
	}
	if s.ram != nil {
		if err := s.ram.Close(); err != nil {
			s.log.Warn("close the RAM", "error", err)
		}
		s.ram = nil
	}
	s.lastIncoming.conn.Store(nil)
	if s.conn != nil {
		if err := s.conn.Close(); err != nil {
			s.log.Warn("close the connection to the destination", "error", err)
		}
	}
	for _, vm := range []*qemu.VM{s.reconnected, s.vm} {
		if vm == nil {
			continue
		}
		if err := vm.Close(); err != nil {
			s.log.Warn("cannot disconnect from QEMU", "error", err)
		}
	}
}
