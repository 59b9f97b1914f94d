// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/migrated-vm/migrated/internal/printable"
	"github.com/migrated-vm/migrated/internal/qemu"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// errDaemonEnded is why a migration was not finished by the daemon that began it.
var errDaemonEnded = errors.New("the daemon ended in the middle of the migration")

// TakeUpSource goes on with a migration whose record an earlier run of this
// daemon left: before the commit point the VM is continued, after it the
// hand-over is repeated and the pages are served. cfg has no ID and no Spec. The
// RAM is offered when it returns, so that the destination's lanes find it.
func TakeUpSource(ctx context.Context, cfg SourceConfig, rec Record) (*Source, error) {
	cfg.ID, cfg.Spec = rec.ID, new(migratedv1.MigrationSpec)
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(rec.Spec, cfg.Spec); err != nil {
		return nil, fmt.Errorf("hand-over record of %s: %w", rec.ID, err)
	}
	s, ctx := newSource(ctx, cfg)
	s.Start()
	s.takenUp = true
	s.noteTakenUp(rec.Completed)
	s.protocol = rec.Protocol
	s.note(func(r *migratedv1.Report) { r.Protocol = rec.Protocol })
	s.token, s.wasRunning, s.stopTried, s.stoppedAt = rec.Token, rec.WasRunning, true, rec.HandedOver
	s.committed, s.toldToRun = rec.Committed, rec.Committed // which the daemon before did as it committed
	close(s.stopped)
	s.log.Warn("taking up a migration that an earlier run of this daemon left", "committed", rec.Committed)
	reached("source-taken-up")
	if rec.Completed {
		go s.finish(rec)
		return s, nil
	}
	err := s.takeUp(ctx, rec)
	go s.runTakenUp(ctx, rec, err)
	return s, nil
}

// finish does what complete had not done yet.
func (s *Source) finish(rec Record) {
	defer close(s.done)
	defer s.cancel(nil)
	defer s.release()
	if rec.Alive() && !s.cfg.Spec.GetKeepSource() {
		if err := s.quitLeft(rec); err != nil {
			s.log.Warn("the source's QEMU is left; it is no longer needed", "error", err)
		}
	}
	if !rec.Alive() {
		s.freeRAM(rec.RAMFiles)
	}
	if !rec.Alive() || !s.cfg.Spec.GetKeepSource() {
		s.forgetRecord()
	}
	if rec.Ended != 0 {
		s.showEnded(endingKept(migratedv1.Reason(rec.Ended)))
		return
	}
	s.update(func(m *migratedv1.Migration) {
		m.State, m.Location = migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, migratedv1.Location_LOCATION_DESTINATION
	})
}

// quitLeft ends the QEMU of the record, unless somebody continued the VM: that may be at work.
func (s *Source) quitLeft(rec Record) (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), attachTimeout+quitTimeout)
	defer cancel()
	if s.vm, err = qemu.Attach(ctx, rec.VM); err != nil {
		return fmt.Errorf("attach to the VM: %w", err)
	}
	if identity, err := s.vm.Identity(); err != nil || identity != rec.Identity {
		return errors.Join(fmt.Errorf("%s is another QEMU's by now, process %d", rec.VM, s.vm.Pid), err)
	}
	if err := s.vm.VerifyStopped(ctx); err != nil {
		return err
	}
	s.undefine()
	return s.vm.Quit(ctx)
}

// takeUp opens what open and prepare did. QEMU is as it was left.
func (s *Source) takeUp(ctx context.Context, rec Record) error {
	ctx, cancel := context.WithTimeout(ctx, attachTimeout)
	defer cancel()
	if !rec.Alive() {
		s.forgetRecord()
		return fmt.Errorf("%w: process %d is gone", errOurQEMUGone, rec.PID)
	}
	var err error
	if s.vm, err = qemu.Attach(ctx, rec.VM); err != nil {
		return fmt.Errorf("attach to the VM: %w", err)
	}
	if identity, err := s.vm.Identity(); err != nil || identity != rec.Identity {
		return errors.Join(fmt.Errorf("%s is another QEMU's by now, process %d", rec.VM, s.vm.Pid), err)
	}
	if s.claim, err = claimed.takeVM(s.vm, s.cfg.ID); err != nil {
		return err
	}
	s.note(func(r *migratedv1.Report) { r.Source.Qemu = s.vm.QMP.Version().String() })
	s.vm.PutBack(rec.Settings)
	if !rec.Committed {
		return nil
	}
	// Serving pages of a VM that runs would be serving what never was.
	if err := s.stands(ctx); err != nil {
		return errors.Join(err, s.connect())
	}
	if s.facts, err = s.vm.Facts(ctx); err != nil {
		return askQEMU("source", err)
	}
	blocks, err := inOrder(rec, s.facts.RAMBlocks)
	if err != nil {
		return err
	}
	if err := s.openRAM(blocks); err != nil {
		return err
	}
	if err := s.offer(); err != nil {
		return err
	}
	s.update(func(m *migratedv1.Migration) { m.VmName, m.Prepared = printable.Line(s.facts.Name), true })
	return nil
}

// savesDevices is the first version of the protocol in which the source saves the devices' state, and all memory of the
// VM is moved as blocks.
const savesDevices = 2

// inOrder returns the VM's memory in the order that was agreed on with the destination.
func inOrder(rec Record, now []qemu.RAMBlock) ([]qemu.RAMBlock, error) {
	if rec.Protocol < savesDevices { // memory backends alone, by their ids, as RAMBlocks sorts them
		return slices.DeleteFunc(slices.Clone(now), func(b qemu.RAMBlock) bool { return !b.IsBackend() }), nil
	}
	var blocks []qemu.RAMBlock
	for _, want := range rec.Blocks {
		at := slices.IndexFunc(now, func(b qemu.RAMBlock) bool {
			return b.ID == want.ID && b.Addr == want.Addr && b.Size == want.Size && b.PageSize == want.PageSize
		})
		if at < 0 {
			return nil, fmt.Errorf("RAM %q is not where it was when the VM was handed over", want.ID)
		}
		blocks = append(blocks, now[at])
	}
	return blocks, nil
}

// takeUpAgain takes up what could not be when the daemon started, because QEMU's monitor was somebody else's: the VM
// stands still until then.
func (s *Source) takeUpAgain(ctx context.Context, rec Record, err error) error {
	for err != nil && s.vm == nil && rec.Alive() {
		s.log.Warn("the VM's QEMU does not answer yet", "error", err)
		state := migratedv1.MigrationState_MIGRATION_STATE_DEVICE
		where := whereabouts{migratedv1.Location_LOCATION_UNKNOWN, "the VM was about to stop on the source"}
		if rec.Committed {
			state, where = migratedv1.MigrationState_MIGRATION_STATE_HANDOVER, s.whereHandedOver()
		}
		s.fail(state, withRemedy(fmt.Errorf("%w: %w", errDaemonEnded, err),
			"have whoever is connected to "+rec.VM+" leave it: QEMU serves one client there, and the VM waits for this daemon"), where)
		if sleep(ctx, time.Second) != nil {
			return err
		}
		err = s.takeUp(ctx, rec)
	}
	return err
}

func (s *Source) runTakenUp(ctx context.Context, rec Record, err error) {
	defer close(s.done)
	defer s.cancel(nil)
	defer s.release()
	err = s.takeUpAgain(ctx, rec, err)
	switch {
	case errors.Is(err, errContinued) && s.committed && s.peer != nil:
		s.takeBack(ctx)
	case err != nil && (s.committed || s.vm == nil):
		s.log.Error("cannot take up the migration", "error", err)
		remedy := "look where the VM runs; only if it certainly runs nowhere: " + s.fallBackCommand()
		where := whereabouts{migratedv1.Location_LOCATION_UNKNOWN, "this daemon did not touch the VM"}
		if errors.Is(err, errOurQEMUGone) {
			remedy, where.words = fmt.Sprintf(endVM, s.cfg.ID), endedStatus
		}
		s.fail(migratedv1.MigrationState_MIGRATION_STATE_FAILED,
			withRemedy(fmt.Errorf("%w: %w", errDaemonEnded, err), remedy), where)
	case !s.committed:
		// Run was never sent: the destination has not run the VM.
		s.backOut(ctx, errors.Join(errDaemonEnded, err))
	default:
		s.guardStopped(ctx)
		s.setState(migratedv1.MigrationState_MIGRATION_STATE_HANDOVER)
		if s.handedOver(ctx) {
			s.seeThrough(ctx)
		}
	}
}
