// SPDX-License-Identifier: Apache-2.0

package migration

import (
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

// awaitStopped is what the page server asks before it serves the first page: a
// destination that needs one early waits for the VM to stand still.
//
// QEMU has answered "stop" when the vCPUs stand and its disks and network cards have
// written to memory what they had to (do_vm_stop in QEMU's cpus.c). It is not asked
// again: while it saves the devices' state it answers nobody, and nobody can continue
// the VM. Before and after that guardStopped hears of it.
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

// handOver repeats Run until the destination answers it, unless it has answered already. The commit point is
// behind us: a cancellation no longer counts, only the daemon's own end does, and that somebody continues the VM here.
// Each time QEMU says before that it stands still.
func (s *Source) handOver(ctx context.Context) error {
	if answer := s.loaded.GetRun(); answer != nil {
		s.switched(answer, s.told, s.answered)
		return nil
	}
	ctx, done := s.untilContinued(ctx)
	defer done()
	destination := s.cfg.Spec.GetDestination()
	s.update(func(m *migratedv1.Migration) {
		m.Location = migratedv1.Location_LOCATION_UNKNOWN
		if s.toldToRun || s.takenUp { // it was sent once, and not answered
			m.State = migratedv1.MigrationState_MIGRATION_STATE_HANDOVER
		}
	})
	for delay := 10 * time.Millisecond; ; delay = min(2*delay, 2*time.Second) {
		if err := s.stands(ctx); err != nil {
			if !s.toldToRun || errors.Is(err, errContinued) {
				return err
			}
			s.log.Warn("the destination is not asked again", "error", err)
			err = withRemedy(err, "see why the source's QEMU does not answer; the hand-over is repeated when it does")
			s.fail(migratedv1.MigrationState_MIGRATION_STATE_HANDOVER,
				withReason(err, migratedv1.Reason_REASON_HANDOVER_UNANSWERED), s.whereHandedOver())
			if err := sleep(ctx, jitter(delay)); err != nil {
				return err
			}
			continue
		}
		s.toldToRun = true
		sent := time.Now()
		callCtx, cancel := context.WithTimeout(ctx, resumeTimeout)
		answer, err := s.peer.Run(callCtx, s.runRequest(sent))
		cancel()
		if err != nil && errors.Is(context.Cause(ctx), errContinued) {
			return errContinued
		}
		switch status.Code(err) {
		case codes.OK:
			s.switched(answer, sent, time.Now())
			return nil
		case codes.Aborted:
			return fmt.Errorf("%w: %w", ErrNotRun, fromPeer("run the VM", destination, err))
		case codes.NotFound, codes.FailedPrecondition:
			// The destination answers, but cannot tell: asking again is no use.
			return withRemedy(fromPeer("run the VM", destination, err),
				s.unless("look on the destination whether the VM runs there; if it does, and needs nothing of the source: "+
					s.releaseCommand()+"; only if it certainly does not: "+s.fallBackCommand()))
		}
		s.log.Warn("the hand-over is not answered, asking again", "error", err)
		failure := fromPeer("run the VM", destination, err)
		if status.Code(err) != codes.Unknown { // that is the destination's own word
			failure = withRemedy(failure, "restore the network between the two hosts; the hand-over is repeated until it is answered")
		}
		s.fail(migratedv1.MigrationState_MIGRATION_STATE_HANDOVER,
			withReason(failure, migratedv1.Reason_REASON_HANDOVER_UNANSWERED), s.whereHandedOver())
		if err := sleep(ctx, jitter(delay)); err != nil {
			if errors.Is(err, errContinued) {
				return err
			}
			return fmt.Errorf("the daemon ended before the destination answered the hand-over: %w", err)
		}
	}
}

// runRequest has the destination run the VM.
func (s *Source) runRequest(sent time.Time) *migratedv1.RunRequest {
	return &migratedv1.RunRequest{Id: s.cfg.ID, Resume: s.wasRunning, StoppedFor: durationpb.New(sent.Sub(s.stoppedAt))}
}

// switched is what follows when the destination has answered, at answered, what was sent at sent: the VM runs there.
func (s *Source) switched(answer *migratedv1.RunResponse, sent, answered time.Time) {
	reached("source-answered")
	stoppedFor := sent.Sub(s.stoppedAt)
	network := max(0, answered.Sub(sent)-answer.GetServeTime().AsDuration())
	downtime := stoppedFor + network/2 + answer.GetResumeTime().AsDuration()
	cont := answer.GetResumeTime().AsDuration()
	if s.loaded.GetRun() != nil {
		// It begins when the destination's QEMU begins to load, and nothing more crossed the network.
		cont, network = cont-s.loaded.GetLoadTime().AsDuration(), 0
	}
	s.log.Info("switched over", "downtime", downtime, "stopped_for", stoppedFor, "network", network, "cont", cont)
	s.runsThere.Store(true)
	steps := &migratedv1.DowntimeSteps{}
	if s.loaded != nil { // else the answer does not tell loading from continuing
		crossing := network / 2
		steps.CrossingTime, steps.ContinueTime = durationpb.New(crossing), durationpb.New(cont)
		steps.CommitTime = durationpb.New(max(0, downtime-s.steps.save-s.steps.transfer-crossing-cont))
	}
	s.noteSteps(steps)
	s.update(func(m *migratedv1.Migration) {
		m.State, m.Location = migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_ACTIVE, migratedv1.Location_LOCATION_DESTINATION
		if m.Error = nil; s.gone.Load() {
			m.Error = s.orphanError()
		}
		if !s.takenUp { // else the switch may have been long before this daemon
			m.Progress.Downtime = durationpb.New(downtime)
		}
	})
}

// follow shows the destination's figures until the last page has arrived. A
// lost connection is no failure of the migration: the pages have their own.
func (s *Source) follow(ctx context.Context) error {
	for delay := 50 * time.Millisecond; ; delay = min(2*delay, 2*time.Second) {
		over, err := s.followOnce(ctx)
		if over {
			return err
		}
		s.log.Warn("lost sight of the destination, asking again", "error", err)
		if status.Code(err) == codes.NotFound {
			s.unheardOf(err)
		}
		if err := sleep(ctx, jitter(delay)); err != nil {
			return fmt.Errorf("the daemon ended before the last page had left: %w", err)
		}
	}
}

// unheardOf shows that the destination's daemon answers, and knows nothing of the migration: what it kept is lost, or it
// was over for long. Pages are served on: the VM may be there, and a daemon may find what was kept.
func (s *Source) unheardOf(err error) {
	destination := s.cfg.Spec.GetDestination()
	s.fail(migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_PAUSED, withRemedy(
		fromPeer("follow the migration", destination, err),
		s.unless("look on the destination whether the VM runs there, with all of its memory; if it does, or has ended: "+
			s.releaseCommand()+"; only if it certainly never will: "+s.fallBackCommand())),
		whereabouts{migratedv1.Location_LOCATION_UNKNOWN, "the destination said that it runs the VM, and knows nothing of it any more"})
}

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
		s.noteTold(answer)
		if state == migratedv1.MigrationState_MIGRATION_STATE_FAILED {
			return true, s.failedThere(answer)
		}
		s.update(func(m *migratedv1.Migration) {
			downtime, deviceState := m.Progress.GetDowntime(), m.Progress.GetBytesDeviceState()
			m.Progress = answer.GetProgress()
			m.Progress.BytesDeviceState = deviceState
			if !s.takenUp { // else the destination alone knows
				m.Progress.Downtime = downtime
			}
			switch m.Error = answer.GetError(); {
			case Terminal(state):
			case s.heardResume():
				m.Error = runsTwiceError()
			case m.Error == nil && s.gone.Load():
				m.Error = s.orphanError()
			}
			if !Terminal(state) { // complete says so once the source has let go
				m.State = state
			}
			if answer.GetLocation() != migratedv1.Location_LOCATION_UNSPECIFIED { // of a daemon that says
				m.Location = answer.GetLocation()
			}
		})
		if Terminal(state) {
			return true, nil
		}
	}
}

// failedThere is what the destination says that has failed after the switch. Its VM may have ended.
func (s *Source) failedThere(answer *migratedv1.WatchIncomingResponse) error {
	shown := answer.GetError()
	if how := toldEnding(shown); how != nil {
		return how
	}
	s.update(func(m *migratedv1.Migration) {
		if answer.GetLocation() != migratedv1.Location_LOCATION_UNSPECIFIED {
			m.Location = answer.GetLocation()
		}
	})
	err := withReason(fmt.Errorf("the destination failed after the switch: %s", shown.GetMessage()), shown.GetReason())
	return withRemedy(err, s.unless("start the VM anew from its disks, once you are certain that it does not run on the destination; "+
		"or, only where its disks are as they were at the switch, continue it here as it was then: "+s.fallBackCommand()))
}

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

// jitter spreads the attempts of many migrations that lost the same network.
func jitter(d time.Duration) time.Duration { return d/2 + rand.N(d/2) }
