// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// awaitStopped makes the page server wait, before it serves the first page, until the VM stands still. A destination
// may ask for a page earlier.
//
// When QEMU has answered "stop", the vCPUs stand still, and its disks and network cards have written to memory what was
// pending (do_vm_stop in QEMU's cpus.c). QEMU is not asked again: while it saves the device state it answers nobody,
// and nobody can continue the VM. Before and after that, guardStopped notices it.
func (s *Source) awaitStopped(ctx context.Context, stopped <-chan struct{}) error {
	select {
	case <-stopped:
		return nil
	case <-s.done:
		return errors.New("the migration is over")
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// handOver sends Run until the destination answers it, unless it has answered already. This is after the commit point:
// a cancellation no longer counts. While there is no answer, only two things end the loop: the end of the daemon, and
// somebody who continues the VM here. Before each Run, QEMU has to say that the VM stands still.
func (s *Source) handOver(ctx context.Context) error {
	if answer := s.loadAnswer.GetRun(); answer != nil {
		s.recordSwitch(answer, s.runSentAt, s.loadAnsweredAt)
		return nil
	}
	ctx, done := s.untilContinued(ctx)
	defer done()
	destination := s.cfg.Spec.GetDestination()
	s.update(func(m *migratedv1.Migration) {
		m.Location = migratedv1.Location_LOCATION_UNKNOWN
		if s.toldToRun() || s.takenUp { // Run was sent before, and not answered
			m.State = migratedv1.MigrationState_MIGRATION_STATE_HANDOVER
		}
	})
	for delay := 10 * time.Millisecond; ; delay = min(2*delay, 2*time.Second) {
		if err := s.checkStopped(ctx); err != nil {
			if !s.toldToRun() || errors.Is(err, errContinued) {
				return err
			}
			s.log.Warn("Run is not repeated while QEMU does not say that the VM stands still", "error", err)
			err = withRemedy(err, "see why the source's QEMU does not answer; the hand-over is repeated when it does")
			s.fail(migratedv1.MigrationState_MIGRATION_STATE_HANDOVER,
				withReason(err, migratedv1.Reason_REASON_HANDOVER_UNANSWERED), s.whereAfterCommit())
			if err := sleep(ctx, jitter(delay)); err != nil {
				return err
			}
			continue
		}
		s.moveTo(runAsked)
		sent := time.Now()
		callCtx, cancel := context.WithTimeout(ctx, resumeTimeout)
		answer, err := s.peer.Run(callCtx, s.runRequest(sent))
		cancel()
		if err != nil && errors.Is(context.Cause(ctx), errContinued) {
			return errContinued
		}
		switch status.Code(err) {
		case codes.OK:
			s.recordSwitch(answer, sent, time.Now())
			return nil
		case codes.Aborted:
			return fmt.Errorf("%w: %w", ErrNotRun, fromPeer("run the VM", destination, err))
		case codes.NotFound, codes.FailedPrecondition:
			// The destination answers that it does not know. Asking again is no use.
			return withRemedy(fromPeer("run the VM", destination, err),
				s.unlessEnded("look on the destination whether the VM runs there; if it does, and needs nothing of the source: "+
					s.releaseCommand()+"; only if it certainly does not: "+s.fallBackCommand()))
		}
		s.log.Warn("the hand-over is not answered, asking again", "error", err)
		failure := fromPeer("run the VM", destination, err)
		if status.Code(err) != codes.Unknown { // the destination sends Unknown itself: the network works
			failure = withRemedy(failure,
				"restore the network between the two hosts; the hand-over is repeated until it is answered")
		}
		s.fail(migratedv1.MigrationState_MIGRATION_STATE_HANDOVER,
			withReason(failure, migratedv1.Reason_REASON_HANDOVER_UNANSWERED), s.whereAfterCommit())
		if err := sleep(ctx, jitter(delay)); err != nil {
			if errors.Is(err, errContinued) {
				return err
			}
			return fmt.Errorf("the daemon ended before the destination answered the hand-over: %w", err)
		}
	}
}

// runRequest returns the request that has the destination run the VM. sent is when it is sent.
func (s *Source) runRequest(sent time.Time) *migratedv1.RunRequest {
	return &migratedv1.RunRequest{Id: s.cfg.ID, Resume: s.wasRunning, StoppedFor: durationpb.New(sent.Sub(s.stoppedAt))}
}

// recordSwitch records that the VM runs at the destination. sent is when Run was sent, answered when its answer came.
func (s *Source) recordSwitch(answer *migratedv1.RunResponse, sent, answered time.Time) {
	testPoint("source-answered")
	stoppedFor := sent.Sub(s.stoppedAt)
	network := max(0, answered.Sub(sent)-answer.GetServeTime().AsDuration())
	downtime := stoppedFor + network/2 + answer.GetResumeTime().AsDuration()
	cont := answer.GetResumeTime().AsDuration()
	if s.loadAnswer.GetRun() != nil {
		// Here ResumeTime begins when the destination's QEMU begins to load, and Run did not cross the network by
		// itself.
		cont, network = cont-s.loadAnswer.GetLoadTime().AsDuration(), 0
	}
	s.log.Info("switched over", "downtime", downtime, "stopped_for", stoppedFor, "network", network, "cont", cont)
	s.moveTo(runsThere)
	steps := &migratedv1.DowntimeSteps{}
	if s.loadAnswer != nil { // else the answer has one time for loading and continuing
		crossing := network / 2
		steps.CrossingTime, steps.ContinueTime = durationpb.New(crossing), durationpb.New(cont)
		steps.CommitTime = durationpb.New(max(0, downtime-s.steps.save-s.steps.transfer-crossing-cont))
	}
	s.noteSteps(steps)
	s.update(func(m *migratedv1.Migration) {
		m.State, m.Location = migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_ACTIVE,
			migratedv1.Location_LOCATION_DESTINATION
		if m.Error = nil; s.qemuGone.Load() {
			m.Error = s.orphanError()
		}
		if !s.takenUp { // else the switch may have been long before this daemon started
			m.Progress.Downtime = durationpb.New(downtime)
		}
	})
}

// follow shows the destination's figures until the last page has arrived. A lost connection is no failure of the
// migration: pages have connections of their own.
func (s *Source) follow(ctx context.Context) error {
	for delay := 50 * time.Millisecond; ; delay = min(2*delay, 2*time.Second) {
		over, err := s.followOnce(ctx)
		if over {
			return err
		}
		s.log.Warn("lost sight of the destination, asking again", "error", err)
		if status.Code(err) == codes.NotFound {
			s.showForgotten(err)
		}
		if err := sleep(ctx, jitter(delay)); err != nil {
			return fmt.Errorf("the daemon ended before the last page had left: %w", err)
		}
	}
}

// showForgotten shows that the destination's daemon answers and does not know the migration: what it kept is lost, or
// the migration was over long ago. The source goes on serving pages: the VM may be there, and a later daemon may find
// what was kept.
func (s *Source) showForgotten(err error) {
	destination := s.cfg.Spec.GetDestination()
	s.fail(migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_PAUSED, withRemedy(
		fromPeer("follow the migration", destination, err),
		s.unlessEnded("look on the destination whether the VM runs there, with all of its memory; if it does, or has ended: "+
			s.releaseCommand()+"; only if it certainly never will: "+s.fallBackCommand())),
		whereabouts{
			migratedv1.Location_LOCATION_UNKNOWN, "the destination said that it runs the VM, and knows nothing of it any more",
		})
}

// followOnce opens one WatchIncoming call and shows what it delivers. over says that the migration is over at the
// destination; err is then nil, or why it failed. Otherwise err is why the call ended.
func (s *Source) followOnce(ctx context.Context) (over bool, err error) {
	stream, err := s.peer.WatchIncoming(ctx, &migratedv1.WatchIncomingRequest{Id: s.cfg.ID})
	if err != nil {
		return false, err
	}
	for {
		answer, err := stream.Recv()
		if err != nil {
			return false, err
		}
		state := answer.GetState()
		s.noteDestinationReport(answer)
		s.noteDefined(answer)
		s.keepLastIncoming(answer)
		if state == migratedv1.MigrationState_MIGRATION_STATE_FAILED {
			if s.staysThere(answer) {
				return false, errors.New("the destination's daemon cannot go on with the migration")
			}
			return true, s.destinationFailure(answer)
		}
		s.update(func(m *migratedv1.Migration) {
			downtime, deviceState := m.Progress.GetDowntime(), m.Progress.GetBytesDeviceState()
			if m.Progress = answer.GetProgress(); m.Progress == nil {
				m.Progress = &migratedv1.Progress{}
			}
			m.Progress.BytesDeviceState = deviceState
			if !s.takenUp { // else only the destination knows it
				m.Progress.Downtime = downtime
			}
			switch m.Error = answer.GetError(); {
			case Terminal(state):
			case s.resumeReported():
				m.Error = runsTwiceError()
			case m.Error == nil && s.qemuGone.Load():
				m.Error = s.orphanError()
			}
			if !Terminal(state) { // complete shows the end, once the source has ended its QEMU
				m.State = state
			}
			if answer.GetLocation() != migratedv1.Location_LOCATION_UNSPECIFIED { // older daemons do not send it
				m.Location = answer.GetLocation()
			}
			if answer.GetQemu() != nil {
				m.DestinationQemu = toldQEMU(answer.GetQemu())
			}
		})
		if Terminal(state) {
			return true, nil
		}
	}
}

// staysThere reports whether a destination has failed whose QEMU lives and has the VM. The migration goes on when that
// host's daemon is started again without the cause, so this host keeps what the VM still needs. staysThere shows that.
func (s *Source) staysThere(answer *migratedv1.WatchIncomingResponse) bool {
	shown := answer.GetError()
	if answer.GetLocation() != migratedv1.Location_LOCATION_DESTINATION || endingFromDestination(shown) != nil {
		return false
	}
	err := withReason(fmt.Errorf("the destination failed after the switch: %s", shown.GetMessage()), shown.GetReason())
	remedy := cmp.Or(shown.GetRemedy(),
		"remove the cause, then restart the destination's daemon: it goes on with the migration")
	s.fail(migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_PAUSED, withRemedy(err, remedy),
		whereabouts{migratedv1.Location_LOCATION_DESTINATION, shown.GetVmStatus()})
	return true
}

// destinationFailure returns the error for a destination that has failed after the switch. It is an endedError if the
// VM ended by itself.
func (s *Source) destinationFailure(answer *migratedv1.WatchIncomingResponse) error {
	shown := answer.GetError()
	if how := endingFromDestination(shown); how != nil {
		return how
	}
	s.update(func(m *migratedv1.Migration) {
		if answer.GetLocation() != migratedv1.Location_LOCATION_UNSPECIFIED {
			m.Location = answer.GetLocation()
		}
	})
	err := withReason(fmt.Errorf("the destination failed after the switch: %s", shown.GetMessage()), shown.GetReason())
	return withRemedy(err, s.unlessEnded("start the VM anew from its disks, once you are certain that it does not run "+
		"on the destination; or, only where its disks are as they were at the switch, "+
		"continue it here as it was then: "+s.fallBackCommand()))
}

// sleep waits for d. If ctx ends before, it returns the cause.
func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// jitter returns a random duration from d/2 to d. It spreads the attempts of many migrations that lost the same
// network.
func jitter(d time.Duration) time.Duration { return d/2 + rand.N(d/2) }
