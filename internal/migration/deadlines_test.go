// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// awaitView waits until ok accepts what the source shows, and returns that.
func (s *stage) awaitView(t *testing.T, ok func(*migratedv1.Migration) bool) *migratedv1.Migration {
	t.Helper()
	for {
		view, changed := s.source.Snapshot()
		if ok(view) {
			return view
		}
		select {
		case <-changed:
		case <-t.Context().Done():
			t.Fatalf("it is %v", view)
		}
		if Terminal(view.GetState()) {
			t.Fatalf("it ended as %v", view)
		}
	}
}

// overdueStage returns a stage whose source is overdue. If the machine is too slow to switch over within the limit, it
// tries again with a longer one.
func overdueStage(t *testing.T, newPeer func() *peer) (s *stage, view *migratedv1.Migration) {
	t.Helper()
	for limit := time.Second; ; limit *= 2 {
		p := newPeer()
		p.spec = &migratedv1.MigrationSpec{TotalLimit: durationpb.New(limit), Labels: map[string]string{"team": "db"}}
		s = newStageWith(t, t.Context(), p)
		s.awaitView(t, (*migratedv1.Migration).GetPrepared)
		s.source.Start()
		view = s.awaitView(t, func(m *migratedv1.Migration) bool { return m.GetOverdue() || Terminal(m.GetState()) })
		switch {
		case view.GetOverdue():
			return s, view
		case view.GetError().GetReason() != migratedv1.Reason_REASON_LIMIT_MISSED:
			t.Fatalf("it ended as %v", view)
		}
	}
}

// shortLimit returns a limit that passes in these tests. No test depends on how soon.
func shortLimit() *durationpb.Duration { return durationpb.New(time.Second) }

// TestSwitchLimit: a limit that passes in the middle of the switch ends the migration, and the VM goes on at the
// source.
func TestSwitchLimit(t *testing.T) {
	s := newStageWith(t, t.Context(), &peer{
		run: runAtOnce, spec: &migratedv1.MigrationSpec{SwitchLimit: shortLimit(), TotalLimit: durationpb.New(time.Hour)},
		load: func(ctx context.Context) error {
			<-ctx.Done()
			return ctx.Err()
		},
	})
	s.awaitView(t, (*migratedv1.Migration).GetPrepared)
	s.source.Start()
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, "switch_limit: it was not handed over within 1s")
	view, _ := s.source.Snapshot()
	if view.GetError().GetReason() != migratedv1.Reason_REASON_LIMIT_MISSED || view.GetOverdue() ||
		view.GetSwitchTime() != nil || view.GetStartTime() == nil || view.GetEndTime() == nil ||
		view.GetLocation() != migratedv1.Location_LOCATION_SOURCE {
		t.Errorf("it ended as %v", view)
	}
	if !s.vmRuns(t) || s.peer.runs != 0 || !s.peer.aborted {
		t.Errorf("the VM runs: %t; told to run %d times; the destination gave up: %t",
			s.vmRuns(t), s.peer.runs, s.peer.aborted)
	}
	s.noRecord(t)
}

// TestLimitsDoNotCountBeforeTheStart: a prepared migration may wait for Start for longer than its limits.
func TestLimitsDoNotCountBeforeTheStart(t *testing.T) {
	s := newStageWith(t, t.Context(), &peer{
		run: runAtOnce, spec: &migratedv1.MigrationSpec{
			PrepareLimit: durationpb.New(time.Minute), SwitchLimit: shortLimit(), TotalLimit: shortLimit(),
		},
	})
	s.awaitView(t, (*migratedv1.Migration).GetPrepared)
	timer := time.NewTimer(2 * shortLimit().AsDuration()) // time for a limit to pass, if it counted
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-s.source.Done():
		view, _ := s.source.Snapshot()
		t.Fatalf("it was given up: %v", view)
	}
	s.source.Start()
	s.awaitView(t, func(m *migratedv1.Migration) bool { return Terminal(m.GetState()) })
}

// TestTotalLimitAfterTheSwitch: the migration goes on, and is shown as overdue, also after it has completed.
func TestTotalLimitAfterTheSwitch(t *testing.T) {
	lastPage := make(chan struct{})
	s, view := overdueStage(t, func() *peer {
		return &peer{
			run: runAtOnce,
			watch: func(stream grpc.ServerStreamingServer[migratedv1.WatchIncomingResponse]) error {
				answer := &migratedv1.WatchIncomingResponse{
					State:    migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_ACTIVE,
					Location: migratedv1.Location_LOCATION_DESTINATION,
					Qemu:     &migratedv1.QemuProcess{Pid: 4711, Qmp: "/run/\x1b.qmp", Log: "/var/log/q.log"},
				}
				if err := stream.Send(answer); err != nil {
					return err
				}
				select {
				case <-lastPage:
				case <-stream.Context().Done():
				}
				answer.State = migratedv1.MigrationState_MIGRATION_STATE_COMPLETED
				return stream.Send(answer)
			},
		}
	})
	if view.GetState() != migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_ACTIVE ||
		view.GetError() != nil || view.GetEndTime() != nil {
		t.Errorf("when its time is over it is %v", view)
	}
	if q := view.GetDestinationQemu(); q.GetPid() != 4711 || q.GetQmp() != `/run/\x1b.qmp` ||
		q.GetLog() != "/var/log/q.log" {
		t.Errorf("the destination's QEMU is shown as %v", q)
	}
	close(lastPage)
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, "")
	view, _ = s.source.Snapshot()
	started, switched, over := view.GetStartTime().AsTime(), view.GetSwitchTime().AsTime(), view.GetEndTime().AsTime()
	if !view.GetOverdue() || view.GetCreateTime().AsTime().After(started) ||
		started.After(switched) || switched.After(over) {
		t.Errorf("it ended as %v", view)
	}
}

// TestTotalLimitWhileTheHandOverIsUnanswered: the VM may run at the destination, so the source does not continue it. It
// does when the destination promises that it has not run the VM.
func TestTotalLimitWhileTheHandOverIsUnanswered(t *testing.T) {
	answer := make(chan struct{})
	s, _ := overdueStage(t, func() *peer {
		return &peer{
			run: func(int) (*migratedv1.RunResponse, error) {
				select {
				case <-answer:
					return nil, status.Error(codes.Aborted, "QEMU died")
				default:
					return nil, status.Error(codes.Unavailable, "a broken wire")
				}
			},
		}
	})
	if !s.handedOver(t) {
		t.Error("the VM is not handed over any more")
	}
	close(answer)
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, "never will")
	if view, _ := s.source.Snapshot(); view.GetSwitchTime() != nil || !s.vmRuns(t) {
		t.Errorf("it ended as %v", view)
	}
}

// TestLimitMissedWhileCommitted: when a limit passed while the VM was handed over and the VM then comes back, the
// migration is given up and not begun again.
func TestLimitMissedWhileCommitted(t *testing.T) {
	s, ctx := idleSource(t)
	s.current.Store(int32(pastCommit))
	if s.giveUpForLimit(errLimitMissed) || ctx.Err() != nil {
		t.Fatal("a VM that was handed over is given up")
	}
	s.undoCommit()
	if !errors.Is(context.Cause(ctx), errLimitMissed) {
		t.Errorf("it goes on: %v", context.Cause(ctx))
	}
}

// TestTakenUpSourceKeepsItsTimes: a source that was taken up keeps its times and its limit.
func TestTakenUpSourceKeepsItsTimes(t *testing.T) {
	s, _ := overdueStage(t, func() *peer {
		return &peer{run: func(int) (*migratedv1.RunResponse, error) {
			return nil, status.Error(codes.Unavailable, "a broken wire")
		}}
	})
	s.source.cancel(errors.New("the daemon ends"))
	<-s.source.Done()
	before, _ := s.source.Snapshot()
	s.takeUp(t)
	view := s.awaitView(t, (*migratedv1.Migration).GetOverdue)
	if !view.GetCreateTime().AsTime().Equal(before.GetCreateTime().AsTime()) ||
		!view.GetStartTime().AsTime().Equal(before.GetStartTime().AsTime()) ||
		view.GetSwitchTime() == nil || view.GetSpec().GetLabels()["team"] != "db" {
		t.Errorf("it was %v\nand is %v", before, view)
	}
}

// TestDestinationIsOverdue: a destination is overdue only once its VM runs here.
func TestDestinationIsOverdue(t *testing.T) {
	d := NewDestination(t.Context(), DestinationConfig{
		Request: &migratedv1.PrepareIncomingRequest{Id: "m"}, Dir: t.TempDir(), Log: slog.New(slog.DiscardHandler),
	})
	if d.showOverdue() {
		t.Error("a VM that does not run here is overdue")
	}
	d.update(func(m *migratedv1.Migration) { m.SwitchTime = m.GetCreateTime() })
	if view, _ := d.Snapshot(); view.GetOverdue() || !d.showOverdue() {
		t.Errorf("it is not overdue: %v", view)
	}
	if view, _ := d.Snapshot(); !view.GetOverdue() {
		t.Errorf("that is not shown: %v", view)
	}
}
