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
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// complete lets the source's QEMU go: its memory is at the destination.
func (s *Source) complete() {
	reached("source-last-page")
	s.letGoOf(migratedv1.Reason_REASON_UNSPECIFIED)
	s.update(func(m *migratedv1.Migration) {
		m.State, m.Location = migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, migratedv1.Location_LOCATION_DESTINATION
	})
	s.log.Info("completed")
}

// letGoOf ends what is left of the VM here, which nobody needs any more: all of it is at the destination, or it ended
// there, for that reason.
func (s *Source) letGoOf(ended migratedv1.Reason) {
	s.export.Withdraw()
	// A daemon that is started again could not tell a QEMU that quit from one that died with memory still needed.
	files := s.ramFiles()
	if err := s.cfg.Records.Complete(s.cfg.ID, ended, files); err != nil {
		s.log.Warn("that all memory has left is not written down", "error", err)
	}
	reached("source-completing")
	if !s.cfg.Spec.GetKeepSource() {
		s.undefine() // it has a time of its own
		ctx, cancel := context.WithTimeout(context.Background(), quitTimeout)
		defer cancel()
		if err := s.vm.Quit(ctx); err != nil {
			s.log.Warn("the source's QEMU did not quit; it is stopped and no longer needed", "error", err)
		} else {
			s.freeRAM(files)
		}
	}
	reached("source-quit")
	if !s.cfg.Spec.GetKeepSource() { // else it says for as long as that QEMU lives that it is not the VM
		s.forgetRecord()
	}
	reached("source-forgotten")
}

func (s *Source) forgetRecord() {
	if err := s.cfg.Records.Remove(s.cfg.ID); err != nil {
		s.log.Warn("the record stays", "error", err)
	}
}

// backOut ends a migration that did not hand the VM over: the VM goes on here.
// It does not look at ctx, which may be over, except for why.
func (s *Source) backOut(ctx context.Context, reason error) {
	if s.export != nil {
		s.export.Withdraw() // no page is read from here on
	}
	note := ""
	switch {
	case s.ended():
		s.forgetRecord()
	case s.stopTried:
		note, _ = s.continueVM()
	}
	s.noteSteps(&migratedv1.DowntimeSteps{})
	s.tellToGiveUp(ctx, reason) // the VM runs again, or never stopped: this has time
	state := migratedv1.MigrationState_MIGRATION_STATE_FAILED
	if errors.Is(reason, ErrCancelled) {
		state = migratedv1.MigrationState_MIGRATION_STATE_CANCELLED
	}
	where := s.whereNow(note)
	s.log.Warn("gave up", "state", state, "reason", reason, "where", where.words)
	s.fail(state, reason, where)
}

// tellToGiveUp has the destination end its QEMU. It does so by itself where this does not arrive.
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

// continueVM puts the VM back to what it was before it was stopped. What its operator has to know besides is to be
// added to where the VM is. The error is why it is not what it was.
func (s *Source) continueVM() (note string, err error) {
	if s.unguard != nil {
		s.unguard()
	}
	reached("source-backing-out")
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
	if _, err = vm.Cont(ctx); err != nil {
		s.log.Error("cannot continue the VM", "error", err)
		// The record stays, for a daemon that is started again to try.
		return fmt.Sprintf("; it could not be continued (%v): continue it with QMP 'cont' on %s, "+
				"after blockdev-del of the node %s if it has that", err, s.cfg.Spec.GetVm(), qemu.ContLockNode),
			fmt.Errorf("continue the VM: %w", err)
	}
	reached("source-continued")
	s.forgetRecord()
	return "", nil
}

// leavePaused takes the disks of a VM back that was paused before, and stays so.
func (s *Source) leavePaused(ctx context.Context) (note string, err error) {
	if s.gaveUpDisks || s.takenUp {
		able, err := s.monitor().ActivateDisks(ctx)
		switch {
		case err != nil:
			s.log.Error("cannot take the VM's disks back", "error", err)
			return fmt.Sprintf(", but QEMU could not take its disks back (%v); it tries again when it is continued", err),
				fmt.Errorf("take the VM's disks back: %w", err)
		case !able:
			s.forgetRecord()
			return "; this QEMU takes its disks back when the VM is continued", nil
		}
	}
	s.forgetRecord()
	return "", nil
}

// monitor is the connection to QEMU, the second where the first was lost.
func (s *Source) monitor() *qemu.VM {
	if s.again != nil {
		return s.again
	}
	return s.vm
}

// awaitMonitor connects to a QEMU again that lives and whose monitor is lost, as libvirt's are with its daemon: the VM
// stands still until then. It gives up with QEMU, and with this daemon, whose record the next one takes up.
func (s *Source) awaitMonitor() {
	for s.vm.QMP.Err() != nil && !s.ended() {
		vm, err := attachSame(s.daemon, s.cfg.Spec.GetVm(), s.vm)
		if err == nil {
			vm.PutBack(s.vm.Changed())
			s.again = vm
			return
		}
		s.log.Warn("the VM's QEMU does not answer yet", "error", err)
		s.fail(migratedv1.MigrationState_MIGRATION_STATE_DEVICE,
			withRemedy(fmt.Errorf("the connection to the VM's QEMU was lost, and cannot be made again: %w", err),
				"see that "+s.cfg.Spec.GetVm()+" can be connected to (start libvirt's daemon, if it is libvirt's): the VM goes on then"),
			whereabouts{migratedv1.Location_LOCATION_UNKNOWN, "the VM was about to stop on the source"})
		if sleep(s.daemon, time.Second) != nil {
			return
		}
	}
}
