// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/migrated-vm/migrated/internal/printable"
	"github.com/migrated-vm/migrated/internal/qemu/ram"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// errSuperseded says that what the record of a migration says is not true any more: the VM went on, and another
// migration has begun.
var errSuperseded = errors.New("another migration has moved the VM since, or is moving it")

// errDaemonEnded is why the daemon that began a migration did not finish it.
var errDaemonEnded = errors.New("the daemon ended in the middle of the migration")

// TakeUpSource goes on with a migration whose record an earlier run of this daemon left. Before the commit point it
// continues the VM. After it, it repeats the hand-over and serves the pages. cfg has no ID and no Spec: they come from
// rec. The RAM is offered when TakeUpSource returns, so that the destination's lanes find it.
func TakeUpSource(ctx context.Context, cfg SourceConfig, rec Record) (*Source, error) {
	cfg.ID, cfg.Spec = rec.ID, new(migratedv1.MigrationSpec)
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(rec.Spec, cfg.Spec); err != nil {
		return nil, fmt.Errorf("hand-over record of %s: %w", rec.ID, err)
	}
	s, ctx := newSource(ctx, cfg)
	s.startOnce.Do(func() { close(s.started) })
	s.takenUp = true
	s.noteTakenUp(rec.Completed)
	s.takeUpTimes(rec)
	s.protocol = rec.Protocol
	s.note(func(r *migratedv1.Report) { r.Protocol = rec.Protocol })
	s.takeUpState(rec)
	s.token, s.wasRunning, s.stoppedAt = rec.Token, rec.WasRunning, rec.HandedOver
	close(s.stopped)
	s.log.Warn("taking up a migration that an earlier run of this daemon left", "committed", rec.Committed)
	testPoint("source-taken-up")
	if rec.Completed {
		go s.finishCompleted(rec)
		return s, nil
	}
	s.takeUpTotalLimit(ctx, rec.Due)
	err := s.takeUp(ctx, rec)
	go s.runTakenUp(ctx, rec, err)
	return s, nil
}

// takeUpTimes shows the times of the record.
func (s *Source) takeUpTimes(rec Record) {
	s.startedAt = rec.Started
	s.update(func(m *migratedv1.Migration) {
		if !rec.Created.IsZero() {
			m.CreateTime = timestamppb.New(rec.Created)
		}
		m.StartTime, m.EndTime = knownTime(rec.Started), knownTime(rec.Over)
		if rec.Committed {
			m.SwitchTime = knownTime(rec.HandedOver)
		}
	})
}

// knownTime converts a time for the API; the zero time, which is not known, becomes nil.
func knownTime(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// finishCompleted does the rest of complete that the earlier run of the daemon had not done.
func (s *Source) finishCompleted(rec Record) {
	defer close(s.done)
	defer s.cancel(nil)
	defer s.release()
	keep := s.cfg.Spec.GetKeepSource()
	s.definedThere = rec.Defined
	var err error
	if rec.Alive() && !keep {
		err = s.endRecorded(rec)
	}
	ended, show := migratedv1.Reason(rec.Ended), s.showCompleted
	if ended != migratedv1.Reason_REASON_UNSPECIFIED {
		show = func() { s.showEnded(endingForReason(ended)) }
	}
	switch {
	case !rec.Alive():
		s.removeRAMFiles(rec.RAMFiles)
		s.showOver(ended, show, nil)
	case keep:
		show()
	default:
		s.showOver(ended, show, err)
	}
}

// takeUp attaches to QEMU and opens and offers its RAM, as attachAndOpen and prepare did. QEMU is as the earlier run
// left it.
func (s *Source) takeUp(ctx context.Context, rec Record) error {
	ctx, cancel := context.WithTimeout(ctx, attachTimeout)
	defer cancel()
	if !rec.Committed {
		if err := s.checkSuperseded(rec); err != nil {
			return err
		}
	}
	if !rec.Alive() {
		s.removeRecord()
		return fmt.Errorf("%w: process %d is gone", errOurQEMUGone, rec.PID)
	}
	vm, err := attachSame(ctx, rec.VM, rec.Identity)
	if err != nil {
		return fmt.Errorf("attach to the VM: %w", err)
	}
	if s.claim, err = qemuClaims.claimVM(vm, s.cfg.ID); err != nil {
		return errors.Join(err, vm.Close()) // another migration is moving the VM: this one must not continue it
	}
	s.vm = vm
	s.note(func(r *migratedv1.Report) { r.Source.Qemu = s.vm.QMP.Version().String() })
	s.vm.PutBack(rec.Settings)
	if !rec.Committed {
		return nil
	}
	// The pages of a running VM must not be served: together they are not its memory at any one moment.
	if err := s.checkStopped(ctx); err != nil {
		return errors.Join(err, s.connect())
	}
	if err := s.keepMemory(ctx); err != nil { // a daemon of an earlier version did not
		s.log.Warn("if QEMU ends before all of the VM's memory has left, what is left is lost", "error", err)
	}
	if s.facts, err = s.vm.Facts(ctx); err != nil {
		return qemuQueryError("source", err)
	}
	blocks, err := blocksInOrder(rec, s.facts.RAMBlocks)
	if err != nil {
		return err
	}
	if err := s.openRAM(blocks); err != nil {
		return err
	}
	if err := s.offerPages(); err != nil {
		return err
	}
	s.update(func(m *migratedv1.Migration) { m.VmName, m.Prepared = printable.Line(s.facts.Name), true })
	return nil
}

// checkSuperseded returns errSuperseded if another migration has begun since this one stopped the VM. It has removed
// this one's record then, or has handed the VM over.
func (s *Source) checkSuperseded(rec Record) error {
	if _, found, err := s.cfg.Records.find(rec.ID); err != nil || !found {
		return cmp.Or(err, errSuperseded)
	}
	later, found, err := s.cfg.Records.ForVM(rec.PID)
	if err != nil || !found {
		return err
	}
	s.removeRecord()
	return fmt.Errorf("%w: %s", errSuperseded, later.ID)
}

// savesDevices is the first version of the protocol in which the source saves the device state, and in which all memory
// of the VM is moved as blocks.
const savesDevices = 2

// blocksInOrder returns the VM's memory in the order that was agreed on with the destination. now is what QEMU has.
func blocksInOrder(rec Record, now []ram.Block) ([]ram.Block, error) {
	if rec.Protocol < savesDevices { // only memory backends, in RAMBlocks' order, by id
		return slices.DeleteFunc(slices.Clone(now), func(b ram.Block) bool { return !b.IsBackend() }), nil
	}
	var blocks []ram.Block
	for _, want := range rec.Blocks {
		at := slices.IndexFunc(now, func(b ram.Block) bool {
			return b.ID == want.ID && b.Addr == want.Addr && b.Size == want.Size && b.PageSize == want.PageSize
		})
		if at < 0 {
			return nil, fmt.Errorf("RAM %q is not where it was when the VM was handed over", want.ID)
		}
		blocks = append(blocks, now[at])
	}
	return blocks, nil
}

// retryTakeUp repeats takeUp until it succeeds, if QEMU's monitor was somebody else's when the daemon started. err is
// the first failure. Before the commit point the VM stands still until then, so neither a cancellation nor a limit ends
// the attempts: only QEMU's end and the daemon's do. After it, FallBack and Release also end them, by ctx.
func (s *Source) retryTakeUp(ctx context.Context, rec Record, err error) error {
	if !rec.Committed {
		ctx = s.daemonCtx
	}
	for err != nil && s.vm == nil && !isFinal(err) {
		s.log.Warn("the VM's QEMU does not answer yet", "error", err)
		state := migratedv1.MigrationState_MIGRATION_STATE_DEVICE
		if rec.Committed {
			state = migratedv1.MigrationState_MIGRATION_STATE_HANDOVER
		}
		s.fail(state, withRemedy(fmt.Errorf("%w (%w)", err, errDaemonEnded), "make sure that "+rec.VM+
			" can be connected to (no other QMP client; libvirt's daemon runs): the VM waits, and this daemon tries again"),
			s.whereNotTakenUp())
		if sleep(ctx, time.Second) != nil {
			return err
		}
		err = s.takeUp(ctx, rec)
	}
	return err
}

// isFinal reports whether another attempt to take a migration up would fail in the same way.
func isFinal(err error) bool {
	return errors.Is(err, errOurQEMUGone) || errors.Is(err, errSuperseded) || errors.Is(err, errOtherQEMU)
}

// whereNotTakenUp returns where the VM is while this daemon, which was started again, is not connected to its QEMU.
func (s *Source) whereNotTakenUp() whereabouts {
	if s.isCommitted() {
		return s.whereAfterCommit()
	}
	return whereabouts{migratedv1.Location_LOCATION_UNKNOWN, "the VM was about to stop on the source"}
}

// runTakenUp drives a migration that was taken up to its end. err is the error of the first takeUp.
func (s *Source) runTakenUp(ctx context.Context, rec Record, err error) {
	defer close(s.done)
	defer s.cancel(nil)
	defer s.release()
	err = s.retryTakeUp(ctx, rec, err)
	switch {
	case errors.Is(err, errContinued) && s.isCommitted() && s.peer != nil:
		s.retractHandOver(ctx)
	case err != nil && s.vm == nil && !isFinal(err) && s.daemonCtx.Err() != nil:
		s.leaveToNextDaemon(err, s.whereNotTakenUp())
	case err != nil && (s.isCommitted() || s.vm == nil):
		s.log.Error("cannot take up the migration", "error", err)
		remedy, where := s.notTakenUp(rec, err)
		s.fail(migratedv1.MigrationState_MIGRATION_STATE_FAILED,
			withRemedy(fmt.Errorf("%w (%w)", err, errDaemonEnded), remedy), where)
	case !s.isCommitted():
		// Run was never sent: the destination has not run the VM.
		s.backOut(ctx, errors.Join(errDaemonEnded, err))
	default:
		s.guardStopped(ctx)
		s.setState(migratedv1.MigrationState_MIGRATION_STATE_HANDOVER)
		if s.finishHandOver(ctx) {
			s.followToEnd(ctx)
		}
	}
}

// notTakenUp returns the remedy for a migration that this daemon cannot take up because of err, and where its VM is.
func (s *Source) notTakenUp(rec Record, err error) (remedy string, where whereabouts) {
	where = whereabouts{migratedv1.Location_LOCATION_UNKNOWN, "this daemon did not touch the VM"}
	switch gone := errors.Is(err, errOurQEMUGone); {
	case gone && !s.isCommitted(): // the destination was never told to run the VM
		return remedyStart, whereabouts{migratedv1.Location_LOCATION_ENDED, endedStatus}
	case errors.Is(err, errSuperseded):
		return "see 'migrated list' for where the VM is", where
	case !s.isCommitted():
		return fmt.Sprintf("continue the VM of process %d with QMP 'cont' on another monitor of it; or, "+
			"when its monitor is at %s again, restart this daemon", rec.PID, rec.VM), where
	case gone:
		where.words = endedStatus
		return fmt.Sprintf(remedyEndVM, s.cfg.ID), where
	default:
		return fmt.Sprintf("remove the cause, then restart this daemon: it goes on with the migration; until then, the "+
			"VM at the destination may wait for memory. See 'migrated status %s' there; only if the VM does not run "+
			"there and never will, run here: %s", s.cfg.ID, s.fallBackCommand()), where
	}
}
