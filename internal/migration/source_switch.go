// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/migrated-vm/migrated/internal/qmp"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// awaitStopped is what the page server asks before it serves the first page: a
// destination that needs one early waits for the VM to stand still.
//
// QEMU says STOP when the vCPUs stand, and only then waits for what its disks and
// network cards still write to memory (do_vm_stop in softmmu/cpus.c). What needs a
// page later was told so by device state that was sent after both. Who waited since
// before waits for both too: QEMU holds its big lock meanwhile, without which it
// answers nobody.
func (s *Source) awaitStopped(ctx context.Context) error {
	select {
	case <-s.stopped:
		return nil
	default:
	}
	select {
	case <-s.stopped:
		return s.vm.VerifyStopped(ctx)
	case <-s.done:
		return errors.New("the migration is over")
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// moveDevices carries the device state over: when it returns nil, the VM is
// stopped and the destination has loaded all of it.
//
// QEMU stops the VM by itself, when its stream has come to the device state.
// Telling it to stop first would be simpler, but then the VM would stand still
// while QEMU sets its migration up and sends firmware and video memory, which
// takes several times as long as the device state.
func (s *Source) moveDevices(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, deviceTimeout,
		fmt.Errorf("the device state did not move within %v", deviceTimeout))
	defer cancel()
	destination := s.cfg.Spec.GetDestination()
	stream, err := s.peer.LoadDeviceState(ctx)
	if err != nil {
		return causeOf(ctx, fromPeer("move the device state", destination, err))
	}
	asked := time.Now()
	if err := stream.Send(&migratedv1.LoadDeviceStateRequest{Id: s.cfg.ID}); err != nil {
		_, err = stream.CloseAndRecv()
		return causeOf(ctx, fromPeer("move the device state", destination, err))
	}
	// The header says that the destination's QEMU reads; without one there is a
	// status instead.
	if header, err := stream.Header(); err != nil || header == nil {
		_, err = stream.CloseAndRecv()
		return causeOf(ctx, fromPeer("move the device state", destination, err))
	}
	ramp := newRamp(s.stopped, time.Since(asked))
	if s.wasRunning, err = s.vm.Running(ctx); err != nil {
		return causeOf(ctx, fmt.Errorf("ask QEMU whether the VM runs: %w", err))
	}
	reached("source-asked")
	if err := s.writeDown(); err != nil {
		return err
	}
	reached("source-recorded")
	carrier, err := newDeviceCarrier()
	if err != nil {
		return err
	}
	defer carrier.close()
	stops := s.vm.QMP.Subscribe("STOP")
	defer stops.Close()
	s.stopTried = true
	saved := make(chan error, 1)
	go func() {
		err := s.vm.MigrateFD(ctx, carrier.qemu)
		// QEMU has its duplicate; ours would keep the stream from ending.
		carrier.closeQEMU()
		saved <- err
	}()
	noted := make(chan error, 1)
	go func() { noted <- s.noteStop(ctx, stops) }()

	sendErr := carrier.sendTo(stream, ramp)
	answer, recvErr := stream.CloseAndRecv()
	if recvErr != nil {
		// Without a reader QEMU's save would hang until the time is over.
		carrier.close()
	}
	saveErr := <-saved
	if recvErr != nil || saveErr != nil || sendErr != nil {
		cancel() // no STOP need come any more
	}
	noteErr := <-noted
	switch {
	case recvErr != nil:
		return causeOf(ctx, errors.Join(fromPeer("move the device state", destination, recvErr), saveErr))
	case saveErr != nil:
		return causeOf(ctx, fmt.Errorf("save the device state: %w", saveErr))
	case sendErr != nil && !errors.Is(sendErr, io.EOF): // EOF: the destination had enough, as its answer says
		return causeOf(ctx, fmt.Errorf("send the device state: %w", sendErr))
	case noteErr != nil:
		return causeOf(ctx, fmt.Errorf("stop the VM: %w", noteErr))
	}
	s.update(func(m *migratedv1.Migration) { m.Progress.BytesDeviceState = answer.GetBytes() })
	return nil
}

// noteStop waits for QEMU to say that the VM is stopped, and lets the page
// server begin.
func (s *Source) noteStop(ctx context.Context, stops *qmp.Subscription) error {
	if !s.wasRunning { // there will be no event
		if err := s.vm.VerifyStopped(ctx); err != nil {
			return err
		}
		s.stoppedAt = time.Now()
		close(s.stopped)
		return nil
	}
	select {
	case event, open := <-stops.Events():
		if !open {
			return s.vm.QMP.Err()
		}
		s.stoppedAt = event.Time
		close(s.stopped)
		reached("source-stopped")
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// guardStopped stops serving pages at once when somebody continues the VM, by
// another monitor or because QEMU's own migration failed: from then on they are
// of another moment than those that were served.
func (s *Source) guardStopped(ctx context.Context) {
	resumes := s.vm.QMP.Subscribe("RESUME")
	go func() {
		defer resumes.Close()
		select {
		case _, open := <-resumes.Events():
			if open {
				s.export.Withdraw()
				s.log.Warn("the VM was continued on the source, its pages are served no more")
			}
		case <-ctx.Done():
		}
	}()
}

// handOver repeats Run until the destination answers it. The commit point is
// behind us: a cancellation no longer counts, only the daemon's own end does.
func (s *Source) handOver(ctx context.Context) error {
	destination := s.cfg.Spec.GetDestination()
	for delay := 10 * time.Millisecond; ; delay = min(2*delay, 2*time.Second) {
		sent := time.Now()
		stoppedFor := sent.Sub(s.stoppedAt)
		callCtx, cancel := context.WithTimeout(ctx, resumeTimeout)
		answer, err := s.peer.Run(callCtx, &migratedv1.RunRequest{
			Id: s.cfg.ID, Resume: s.wasRunning, StoppedFor: durationpb.New(stoppedFor),
		})
		cancel()
		switch status.Code(err) {
		case codes.OK:
			reached("source-answered")
			network := max(0, time.Since(sent)-answer.GetServeTime().AsDuration())
			downtime := stoppedFor + network/2 + answer.GetResumeTime().AsDuration()
			s.log.Info("switched over", "downtime", downtime)
			s.update(func(m *migratedv1.Migration) {
				m.State = migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_ACTIVE
				m.Error = nil
				if !s.takenUp { // else the switch may have been long before this daemon
					m.Progress.Downtime = durationpb.New(downtime)
				}
			})
			return nil
		case codes.Aborted:
			return fmt.Errorf("%w: %w", ErrNotRun, fromPeer("run the VM", destination, err))
		case codes.NotFound, codes.FailedPrecondition:
			// The destination answers, but cannot tell: asking again is no use.
			return withRemedy(fromPeer("run the VM", destination, err),
				"look on the destination whether the VM runs there; only if it certainly does not: "+s.fallBackCommand())
		}
		s.log.Warn("the hand-over is not answered, asking again", "error", err)
		failure := fromPeer("run the VM", destination, err)
		if status.Code(err) != codes.Unknown { // that is the destination's own word
			failure = withRemedy(failure, "restore the network between the two hosts; the hand-over is repeated until it is answered")
		}
		s.fail(migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_PAUSED, failure, s.stoppedStatus())
		if err := sleep(ctx, jitter(delay)); err != nil {
			return fmt.Errorf("the daemon ended before the destination answered the hand-over: %w", err)
		}
	}
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
		if err := sleep(ctx, jitter(delay)); err != nil {
			return fmt.Errorf("the daemon ended before the last page had left: %w", err)
		}
	}
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
		if state == migratedv1.MigrationState_MIGRATION_STATE_FAILED {
			shown := answer.GetError()
			return true, withRemedy(fmt.Errorf("the destination failed after the switch: %s", shown.GetMessage()),
				"once you are certain that the VM does not run on the destination, continue it here, as it was at the switch: "+s.fallBackCommand())
		}
		s.update(func(m *migratedv1.Migration) {
			downtime, deviceState := m.Progress.GetDowntime(), m.Progress.GetBytesDeviceState()
			m.Progress = answer.GetProgress()
			m.Progress.BytesDeviceState = deviceState
			if !s.takenUp { // else the destination alone knows
				m.Progress.Downtime = downtime
			}
			m.Error = answer.GetError()
			if !Terminal(state) { // complete says so once the source has let go
				m.State = state
			}
		})
		if Terminal(state) {
			return true, nil
		}
	}
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
