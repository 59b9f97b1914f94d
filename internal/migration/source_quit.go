// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"time"

	"github.com/migrated-vm/migrated/internal/libvirt"
	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/ram"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// longestQuitPause bounds the pause between two attempts to end a QEMU that nobody needs.
const longestQuitPause = 10 * time.Second

// endSourceVM ends what is left of the VM here. Nobody needs it any more: all of the VM is at the destination, or the
// VM ended there by itself, for the reason ended. show is called to show the migration as over.
func (s *Source) endSourceVM(ended migratedv1.Reason, show func()) {
	s.export.Withdraw()
	// Note it before QEMU quits: a restarted daemon cannot tell a QEMU that quit from one that died with memory that is
	// still needed.
	files := s.ramFilesOf(s.vm)
	if err := s.cfg.Records.Complete(s.cfg.ID, ended, files); err != nil {
		s.log.Warn("cannot record that all memory has left", "error", err)
	}
	testPoint("source-completing")
	if s.cfg.Spec.GetKeepSource() { // the record keeps that QEMU from being taken for the VM while it lives
		show()
		return
	}
	err := s.endQEMU(ended, files)
	testPoint("source-quit")
	s.showOver(ended, show, err)
}

// showOver shows a migration as over whose QEMU was to be ended, and reports it. err is the result of that:
// errContinued, why QEMU has not ended, or nil. ended and show are as in endSourceVM.
func (s *Source) showOver(ended migratedv1.Reason, show func(), err error) {
	switch {
	case errors.Is(err, errContinued):
		s.log.Error("the source's QEMU is left alone", "reason", err)
		s.showContinuedHere(ended)
		s.reportAndForget()
	case err != nil:
		show()
		s.log.Warn("cannot end the source's QEMU yet, which is stopped and no longer needed", "error", err)
		s.report()
		s.endLater()
	default:
		show()
		s.reportAndForget()
	}
}

// endQEMU ends the source's QEMU, and removes the files of its memory. ended is as in endSourceVM. It leaves the QEMU
// alone, and returns errContinued, if somebody has continued the VM: it is in use.
func (s *Source) endQEMU(ended migratedv1.Reason, files []ram.File) error {
	err := s.checkStopped(context.Background())
	if errors.Is(err, errStoppedUnknown) && s.vm.QMP.Err() == nil {
		err = nil // QEMU hangs, and has not said on this connection that the VM was continued
	}
	if err != nil {
		return err
	}
	if err := s.quit(s.vm, ended); err != nil {
		return err
	}
	s.removeRAMFiles(files)
	return nil
}

// quit undefines the domain, if there is one and that is asked for, and ends its QEMU. The VM must stand still. ended
// is as in endSourceVM.
func (s *Source) quit(vm *qemu.VM, ended migratedv1.Reason) error {
	s.undefine(ended, vm.Ended) // has a time limit of its own
	return s.quitQEMU(context.Background(), vm)
}

// quitQEMU ends vm. The VM must stand still.
func (s *Source) quitQEMU(ctx context.Context, vm *qemu.VM) error {
	ctx, cancel := context.WithTimeout(ctx, quitTimeout)
	defer cancel()
	err := vm.Quit(ctx)
	if errors.Is(err, libvirt.ErrOwner) { // QEMU has ended
		s.log.Error("an image of the VM may have the wrong owner now", "error", err)
		return nil
	}
	return err
}

// showContinuedHere shows a migration as over whose VM somebody continued here although it was at the destination.
// ended is why it ended there; unspecified: it did not.
func (s *Source) showContinuedHere(ended migratedv1.Reason) {
	if ended != migratedv1.Reason_REASON_UNSPECIFIED {
		how := endingForReason(ended)
		s.fail(migratedv1.MigrationState_MIGRATION_STATE_ENDED, withRemedy(withReason(how, how.reason),
			remedyOlderMemory), whereabouts{
			migratedv1.Location_LOCATION_SOURCE,
			"the VM has ended on the destination, and was continued on the source, where it is now",
		})
		return
	}
	s.update(func(m *migratedv1.Migration) {
		m.State, m.Location = migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, migratedv1.Location_LOCATION_DESTINATION
		m.Error = runsTwiceError()
	})
}

// endLater goes on, when the migration has ended, to end the QEMU of the record, which is stopped and which nobody
// needs. It gives up when somebody has continued the VM, or when this daemon ends: the next one goes on. The record
// stays until then, so that nobody takes that QEMU for the VM.
func (s *Source) endLater() {
	rec, found, err := s.cfg.Records.find(s.cfg.ID)
	if err != nil || !found {
		s.log.Warn("the source's QEMU stays: there is no record of it", "error", err)
		return
	}
	go func() {
		<-s.done
		for pause := time.Second; rec.Alive(); pause = min(2*pause, longestQuitPause) {
			if sleep(s.daemonCtx, pause) != nil {
				return
			}
			err := s.endRecorded(rec)
			if errors.Is(err, errContinued) {
				s.log.Error("the source's QEMU is left alone", "reason", err)
				s.removeRecordOf(rec)
				return
			}
			if err != nil {
				s.log.Warn("the source's QEMU is not ended yet", "error", err)
			}
		}
		s.removeRAMFiles(rec.RAMFiles)
		s.removeRecordOf(rec)
	}()
}

// removeRecordOf removes the record, unless the migration was deleted meanwhile and another one of its id has written
// its own.
func (s *Source) removeRecordOf(rec Record) {
	now, found, err := s.cfg.Records.find(s.cfg.ID)
	if err == nil && found && now.Identity == rec.Identity && now.HandedOver.Equal(rec.HandedOver) {
		s.removeRecord()
	}
}

// endRecorded ends the QEMU of the record. It leaves the QEMU alone, and returns errContinued, if the VM runs.
func (s *Source) endRecorded(rec Record) error {
	vm, err := attachSame(context.Background(), rec.VM, rec.Identity)
	if err != nil {
		return err
	}
	asking, cancel := context.WithTimeout(context.Background(), stoppedTimeout)
	defer cancel()
	running, err := vm.Running(asking)
	switch {
	case err == nil && running:
		err = errContinued
	case err == nil:
		err = s.quit(vm, migratedv1.Reason(rec.Ended))
	}
	return errors.Join(err, vm.Close())
}
