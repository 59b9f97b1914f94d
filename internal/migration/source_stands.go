// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

var (
	// errContinued says that the VM runs, or has run, on the source since this source stopped it: the destination has an
	// older one.
	errContinued = withRemedy(errors.New("somebody continued the VM on the source while it was being moved"),
		"migrate it again, and leave its monitors alone meanwhile")
	// errStandsUnknown says that nobody can tell whether the VM stands still.
	errStandsUnknown = errors.New("it is not known whether the VM stands still on the source")
)

// runsTwice is what to do about a VM that runs on both hosts.
const runsTwice = "both write to the same disks: end one of the two QEMUs at once (QMP 'quit'); " +
	"the destination's gets no more pages"

// standsTimeout bounds the question whether the VM stands still. QEMU answers within a millisecond, or hangs.
const standsTimeout = 5 * time.Second

// stands is nil if QEMU says, now, that the VM does not run, and it has not run since it was stopped: then it may be
// handed over. The error is errContinued where it has, and errStandsUnknown where QEMU does not say. A QEMU that has
// ended cannot run the VM.
func (s *Source) stands(ctx context.Context) error {
	if s.ended() {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, standsTimeout)
	defer cancel()
	running, err := s.running(ctx)
	switch {
	case s.heardResume() || err == nil && running:
		return errContinued
	case err != nil && s.ended():
		return nil
	case err != nil:
		return fmt.Errorf("%w: %w", errStandsUnknown, err)
	default:
		return nil
	}
}

// running asks QEMU whether the VM runs, over another connection where the first has ended.
func (s *Source) running(ctx context.Context) (bool, error) {
	if s.vm.QMP.Err() == nil {
		return s.vm.Running(ctx)
	}
	vm, err := attachSame(ctx, s.cfg.Spec.GetVm(), s.vm)
	if err != nil {
		return false, err
	}
	running, err := vm.Running(ctx)
	return running, errors.Join(err, vm.Close())
}

// heardResume says whether QEMU has reported that the VM was continued, until the last answer that was read of it.
func (s *Source) heardResume() bool {
	select {
	case <-s.resumed:
		return true
	default:
		return s.resumes != nil && len(s.resumes.Events()) > 0
	}
}

// guardStopped stops serving pages at once when somebody continues the VM by another monitor: from then on they are of
// another moment than those that were served. Before the commit point that is the end of the migration, after it the
// end of the hand-over, or the VM would run twice. unguard ends it, before the migration itself continues the VM.
func (s *Source) guardStopped(ctx context.Context) {
	resumes := s.vm.QMP.Subscribe("RESUME")
	s.resumes = s.vm.QMP.Subscribe("RESUME") // nobody takes an event out of it: see heardResume
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	s.unguard = func() {
		cancel()
		<-ended
	}
	go func() {
		defer close(ended)
		defer resumes.Close()
		select {
		case _, open := <-resumes.Events():
			if open && ctx.Err() == nil {
				s.continued()
			}
		case <-ctx.Done():
		}
	}()
}

// continued is what follows when the VM runs here.
func (s *Source) continued() {
	close(s.resumed)
	s.export.Withdraw()
	s.log.Warn("the VM was continued on the source, its pages are served no more")
	if s.runsThere.Load() {
		s.update(func(m *migratedv1.Migration) {
			if !Terminal(m.GetState()) {
				m.Error = runsTwiceError()
			}
		})
	}
	s.commitMu.Lock()
	defer s.commitMu.Unlock()
	if !s.committed {
		s.cancel(errContinued)
	}
}

// untilContinued is ctx, which also ends when somebody continues the VM.
func (s *Source) untilContinued(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		select {
		case <-s.resumed:
			cancel(errContinued)
		case <-ctx.Done():
		}
	}()
	return ctx, func() { cancel(nil) }
}

// takeBack ends a hand-over whose VM somebody has continued here, after the destination may have been told to run it:
// the destination is not told again, but asked to give up until it answers. Its answer alone says whether the VM runs
// once or twice. It does not touch the VM.
func (s *Source) takeBack(ctx context.Context) {
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
			s.giveBack()
			s.forgetRecord()
			s.fail(migratedv1.MigrationState_MIGRATION_STATE_FAILED, errContinued,
				s.whereContinued(migratedv1.Location_LOCATION_SOURCE, ErrNotRun.Error()))
			return
		case codes.FailedPrecondition:
			s.forgetRecord() // it is about a VM that stands still
			s.fail(migratedv1.MigrationState_MIGRATION_STATE_FAILED,
				withRemedy(fmt.Errorf("%w: %w", errContinued, fromPeer("give up", destination, err)), runsTwice),
				s.whereContinued(migratedv1.Location_LOCATION_UNKNOWN, "the destination says that it runs there, too"))
			return
		case codes.NotFound:
			s.forgetRecord()
			s.fail(migratedv1.MigrationState_MIGRATION_STATE_FAILED,
				withRemedy(fmt.Errorf("%w: %w", errContinued, fromPeer("give up", destination, err)),
					"look on the destination whether the VM runs there, too; "+runsTwice),
				s.whereContinued(migratedv1.Location_LOCATION_UNKNOWN, "the destination does not say whether it runs there, too"))
			return
		}
		s.log.Warn("the destination does not say whether a VM that was continued here runs there, too", "error", err)
		s.fail(migratedv1.MigrationState_MIGRATION_STATE_HANDOVER,
			withRemedy(fmt.Errorf("%w: %w", errContinued, fromPeer("give up", destination, err)),
				"restore the network between the two hosts: the destination is asked to give up until it answers. "+
					"Until then look on the destination whether the VM runs there, too; "+runsTwice),
			s.whereContinued(migratedv1.Location_LOCATION_UNKNOWN, "it may run on the destination, too"))
		if err := sleep(ctx, jitter(delay)); err != nil {
			s.fail(migratedv1.MigrationState_MIGRATION_STATE_FAILED,
				fmt.Errorf("%w; the daemon ended before the destination said whether it runs there, too: %w", errContinued, err),
				s.whereContinued(migratedv1.Location_LOCATION_UNKNOWN, "it may run on the destination, too"))
			return // the record stays, for the next daemon to ask
		}
	}
}

// runsTwiceError is shown of a VM that somebody continued here although it was at the destination.
func runsTwiceError() *migratedv1.MigrationError {
	shown := describe(withRemedy(fmt.Errorf("%w, after it had been handed over", errContinued), runsTwice))
	shown.VmStatus = "the VM was continued on the source, and is on the destination, too, where it gets no more pages"
	return shown
}

// whereContinued is where a VM is that somebody continued here, and what there is to say of the destination.
func (s *Source) whereContinued(location migratedv1.Location, there string) whereabouts {
	_, _, words := look(s.vm)
	return whereabouts{location, words + "; " + there}
}
