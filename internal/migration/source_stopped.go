// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/internal/qemu"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

var (
	// errContinued says that the VM runs, or has run, on the source after this source stopped it: what the destination
	// has is older.
	errContinued = withRemedy(errors.New("somebody continued the VM on the source while it was being moved"),
		"migrate it again, and leave its monitors alone meanwhile")
	// errStoppedUnknown says that QEMU does not answer whether the VM stands still.
	errStoppedUnknown = errors.New("it is not known whether the VM stands still on the source")
	// errStoppedItself says that the VM would stand still now without this migration, too.
	errStoppedItself = withReason(errors.New("the VM stopped by itself at this moment: its guest powered off or "+
		"panicked, or a disk failed"), migratedv1.Reason_REASON_VM_STOPPED_ITSELF)
)

// remedyRunsTwice is the remedy for a VM that runs on both hosts.
const remedyRunsTwice = "end one of the two QEMUs at once (QMP 'quit'): both write to the same disks. " +
	"The destination's QEMU gets no more memory from the source"

// remedyOlderMemory is the remedy for a VM that was continued on the source and has ended on the destination.
const remedyOlderMemory = "check the file systems of the VM on the source: its memory is that of the switch, " +
	"and its disks have what it wrote on the destination"

// stoppedTimeout bounds the question whether the VM stands still. QEMU answers within a millisecond, or hangs.
const stoppedTimeout = 5 * time.Second

// checkStopped returns nil if the VM may be handed over: QEMU says, now, that it does not run, and it has not run since
// it was stopped. If it has, the error is errContinued. If QEMU does not answer, the error is errStoppedUnknown. A QEMU
// that has ended cannot run the VM, which is nil, too.
func (s *Source) checkStopped(ctx context.Context) error {
	_, err := s.statusStopped(ctx)
	return err
}

// statusStopped is checkStopped. It also returns QEMU's run state; it is empty for a QEMU that has ended.
func (s *Source) statusStopped(ctx context.Context) (status string, err error) {
	if s.qemuEnded() {
		return "", nil
	}
	ctx, cancel := context.WithTimeout(ctx, stoppedTimeout)
	defer cancel()
	status, err = s.askStatus(ctx)
	switch {
	case s.resumeReported() || err == nil && status == "running":
		return status, errContinued
	case err != nil && s.qemuEnded():
		return "", nil
	case err != nil:
		return "", fmt.Errorf("%w: %w", errStoppedUnknown, err)
	default:
		return status, nil
	}
}

// checkMayRun is checkStopped before the destination is told to run the VM for the first time. It also fails if the VM
// stopped by itself, and if QEMU has ended: memory that only QEMU had went with it, so the VM ends, as it would have
// without a migration.
func (s *Source) checkMayRun(ctx context.Context) error {
	status, err := s.statusStopped(ctx)
	switch {
	case err != nil:
		return err
	case s.qemuEnded():
		return withRemedy(errOurQEMUGone, remedyStart)
	case s.endReported() || s.wasRunning && status != "paused":
		return withRemedy(fmt.Errorf("%w (QEMU says %q)", errStoppedItself, status),
			"bring the VM to run or pause it, then try again")
	}
	return nil
}

// askStatus asks QEMU for its run state. If the connection has ended, it makes another one for the question.
func (s *Source) askStatus(ctx context.Context) (string, error) {
	if s.vm.QMP.Err() == nil {
		return s.vm.Status(ctx)
	}
	vm, err := attachAgain(ctx, s.cfg.Spec.GetVm(), s.vm)
	if err != nil {
		return "", err
	}
	status, err := vm.Status(ctx)
	return status, errors.Join(err, vm.Close())
}

// endReported reports whether QEMU has said that the guest powered off or panicked. QEMU calls such a VM "paused" if it
// happened while QEMU was stopping it for this migration.
func (s *Source) endReported() bool { return s.endEvents != nil && len(s.endEvents.Events()) > 0 }

// stoppedItself reports whether the VM stopped by itself, as far as QEMU says.
func (s *Source) stoppedItself(ctx context.Context, vm *qemu.VM) bool {
	if s.endReported() {
		return true
	}
	status, err := vm.Status(ctx)
	return err == nil && hasStoppedItself(status)
}

// resumeReported reports whether QEMU has said that the VM was continued, in an event that came before the last answer
// read from it.
func (s *Source) resumeReported() bool {
	select {
	case <-s.continuedByOther:
		return true
	default:
		return s.resumeEvents != nil && len(s.resumeEvents.Events()) > 0
	}
}

// guardStopped stops serving pages as soon as somebody continues the VM through another monitor. From then on the pages
// are not those of the moment at which the VM was stopped. Before the commit point this ends the migration, after it
// the hand-over; else the VM could run twice. endGuard ends the guard, before the migration itself continues the VM.
func (s *Source) guardStopped(ctx context.Context) {
	resumes := s.vm.QMP.Subscribe("RESUME")
	// These are never read: resumeReported and endReported look at the length of the queue.
	s.resumeEvents = s.vm.QMP.Subscribe("RESUME")
	s.endEvents = s.vm.QMP.Subscribe("SHUTDOWN", "GUEST_PANICKED")
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	s.endGuard = func() {
		cancel()
		<-ended
	}
	go func() {
		defer close(ended)
		defer resumes.Close()
		select {
		case _, open := <-resumes.Events():
			if open && ctx.Err() == nil {
				s.onContinued()
			}
		case <-ctx.Done():
		}
	}()
}

// onContinued stops serving pages after somebody has continued the VM here. Before the commit point it cancels the
// migration.
func (s *Source) onContinued() {
	close(s.continuedByOther)
	s.export.Revoke()
	s.log.Warn("the VM was continued on the source, its pages are served no more")
	if s.confirmedRun() {
		s.updateUnlessOver(func(m *migratedv1.Migration) { m.Error = runsTwiceError() })
	}
	s.commitMu.Lock()
	defer s.commitMu.Unlock()
	if !s.isCommitted() {
		s.cancel(errContinued)
	}
}

// untilContinued returns a context that also ends, with errContinued, when somebody continues the VM.
func (s *Source) untilContinued(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		select {
		case <-s.continuedByOther:
			cancel(errContinued)
		case <-ctx.Done():
		}
	}()
	return ctx, func() { cancel(nil) }
}

// retractHandOver ends a hand-over whose VM somebody has continued here, although the destination may have been told to
// run it. It does not send Run again, but asks the destination to give up, until that answers. Only the answer says
// whether the VM runs on one host or on both. retractHandOver does not touch the VM.
func (s *Source) retractHandOver(ctx context.Context) {
	if s.export != nil {
		s.export.Withdraw()
	}
	destination := s.cfg.Spec.GetDestination()
	for delay := 10 * time.Millisecond; ; delay = min(2*delay, 2*time.Second) {
		callCtx, cancel := context.WithTimeout(ctx, abortTimeout)
		_, err := s.peer.AbortIncoming(callCtx, &migratedv1.AbortIncomingRequest{Id: s.cfg.ID, Reason: errContinued.Error()})
		cancel()
		switch status.Code(err) {
		case codes.OK:
			s.log.Warn("the VM was continued on the source, and the destination has given up")
			s.undoCommit()
			s.removeRecord()
			s.fail(migratedv1.MigrationState_MIGRATION_STATE_FAILED, errContinued,
				s.whereContinued(migratedv1.Location_LOCATION_SOURCE, ErrNotRun.Error()))
			return
		case codes.FailedPrecondition:
			s.clearCommit()
			s.removeRecord() // a record is for a VM that stands still
			s.showRanThere(fromPeer("give up", destination, err))
			return
		case codes.NotFound:
			s.clearCommit()
			s.removeRecord()
			s.fail(migratedv1.MigrationState_MIGRATION_STATE_FAILED,
				withRemedy(fmt.Errorf("%w: %w", errContinued, fromPeer("give up", destination, err)),
					"look on the destination whether the VM runs there, too; if it does, "+remedyRunsTwice),
				s.whereContinued(migratedv1.Location_LOCATION_UNKNOWN, "the destination does not say whether it runs there, too"))
			return
		}
		s.log.Warn("the destination does not say whether a VM that was continued here runs there, too", "error", err)
		s.fail(migratedv1.MigrationState_MIGRATION_STATE_HANDOVER,
			withRemedy(fmt.Errorf("%w: %w", errContinued, fromPeer("give up", destination, err)),
				"restore the network between the two hosts: the destination is asked to give up until it answers. "+
					"Until then look on the destination whether the VM runs there, too; if it does, "+remedyRunsTwice),
			s.whereContinued(migratedv1.Location_LOCATION_UNKNOWN, "it may run on the destination, too"))
		if err := sleep(ctx, jitter(delay)); err != nil {
			s.fail(migratedv1.MigrationState_MIGRATION_STATE_FAILED,
				fmt.Errorf("%w; the daemon ended before the destination said whether it runs there, too: %w", errContinued, err),
				s.whereContinued(migratedv1.Location_LOCATION_UNKNOWN, "it may run on the destination, too"))
			return // the record stays, so that the next daemon asks
		}
	}
}

// showRanThere shows the end of a migration whose VM somebody continued here. told is what the destination says, which
// was told to run the VM, too.
func (s *Source) showRanThere(told error) {
	err := fmt.Errorf("%w: %w", errContinued, told)
	if reasonOf(told) == migratedv1.Reason_REASON_DESTINATION_QEMU_ENDED {
		s.fail(migratedv1.MigrationState_MIGRATION_STATE_FAILED,
			withRemedy(withReason(err, migratedv1.Reason_REASON_INTERFERED), remedyOlderMemory),
			s.whereContinued(migratedv1.Location_LOCATION_SOURCE, "on the destination it has ended"))
		return
	}
	s.fail(migratedv1.MigrationState_MIGRATION_STATE_FAILED, withRemedy(err, cmp.Or(Remedy(told), remedyRunsTwice)),
		s.whereContinued(migratedv1.Location_LOCATION_UNKNOWN, "the destination was told to run it, too"))
}

// runsTwiceError returns the error that is shown for a VM that somebody continued here although it was at the
// destination.
func runsTwiceError() *migratedv1.MigrationError {
	shown := Describe(withRemedy(fmt.Errorf("%w, after it had been handed over", errContinued), remedyRunsTwice))
	shown.VmStatus = "the VM was continued on the source, and is on the destination, too, where it gets no more memory"
	return shown
}

// whereContinued returns where a VM is that somebody continued here. location is where it is as long as its QEMU here
// lives, and there what is known of the destination.
func (s *Source) whereContinued(location migratedv1.Location, there string) whereabouts {
	here, _, words := locateVM(s.vm)
	if location == migratedv1.Location_LOCATION_SOURCE {
		location = here // it may have ended
	}
	return whereabouts{location, words + "; " + there}
}
