// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"testing"
	"time"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// LimitIncoming answers as a destination whose own limit is 7 MiB/s.
func (p *peer) LimitIncoming(
	_ context.Context, r *migratedv1.LimitIncomingRequest,
) (*migratedv1.LimitIncomingResponse, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.limit = r.GetBandwidth()
	return &migratedv1.LimitIncomingResponse{Bandwidth: 7 << 20}, nil
}

// A source passes on the lower of its own limit and the requested one, when it prepares and later.
func TestSourceLimit(t *testing.T) {
	s := newStage(t, t.Context(), runAtOnce)
	for view, changed := s.source.Snapshot(); !view.GetPrepared(); view, changed = s.source.Snapshot() {
		if _, err := s.source.SetBandwidth(t.Context(), 1<<20); err != nil && !errors.Is(err, errNotPrepared) {
			t.Fatal(err)
		}
		<-changed
	}
	for _, c := range []struct{ own, asked, want uint64 }{
		{0, 5 << 20, 5 << 20}, {3 << 20, 5 << 20, 3 << 20}, {3 << 20, 0, 3 << 20}, {0, 0, 0},
	} {
		s.source.cfg.Bandwidth = c.own
		if holds, err := s.source.SetBandwidth(t.Context(), c.asked); holds != 7<<20 || err != nil || s.peer.limit != c.want {
			t.Errorf("own %d, asked for %d: the destination was told %d, and %d holds, %v",
				c.own, c.asked, s.peer.limit, holds, err)
		}
	}
	s.source.Start()
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, "")
	if _, err := s.source.SetBandwidth(t.Context(), 1<<20); !errors.Is(err, errOver) {
		t.Errorf("after the end: %v", err)
	}
}

// TestLimitOutlivesAnAttempt: a source that prepares afresh begins with the limit that was set since it prepared.
func TestLimitOutlivesAnAttempt(t *testing.T) {
	p := &peer{run: runAtOnce}
	s := newEarlyStage(t, p)
	if _, err := s.source.SetBandwidth(t.Context(), 5<<20); err != nil {
		t.Fatal(err)
	}
	s.source.earlySavedAt = time.Now().Add(-time.Hour)
	s.source.Start()
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, "")
	if p.prepareCalls != 2 || p.bandwidth != 5<<20 {
		t.Errorf("prepared %d times, at last with a limit of %d", p.prepareCalls, p.bandwidth)
	}
}

// A limit outlives the daemon, but not that daemon's own limit, which may differ after a restart.
func TestLimitOutlivesTheDaemon(t *testing.T) {
	l := leaveDestination(t, true)
	if _, err := l.vm.Cont(t.Context()); err != nil {
		t.Fatal(err)
	}
	l.kept.header().toldToRun.Store(1)
	l.kept.header().bandwidth.Store(100 << 20)
	l.ran()
	if err := l.kept.close(); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ own, before, set, want uint64 }{
		{0, 100 << 20, 50 << 20, 50 << 20},
		{20 << 20, 20 << 20, 30 << 20, 20 << 20},
		{0, 30 << 20, 10 << 20, 10 << 20}, // not the 20 of the daemon before
	} {
		daemon, stop := context.WithCancelCause(t.Context())
		d, err := TakeUpDestination(daemon, DestinationConfig{
			Dir: l.dir, FaultWorkers: 1, Bandwidth: c.own, Log: slog.New(slog.DiscardHandler),
			Dial: func(context.Context, string) (net.Conn, error) { return nil, errors.New("no source here") },
		})
		if err != nil {
			t.Fatal(err)
		}
		if view, _ := d.Snapshot(); view.GetProgress().GetBandwidth() != c.before {
			t.Errorf("own %d: taken up with a limit of %d, want %d", c.own, view.GetProgress().GetBandwidth(), c.before)
		}
		if holds, err := d.SetBandwidth(c.set); holds != c.want || err != nil {
			t.Errorf("own %d: of %d holds %d, %v", c.own, c.set, holds, err)
		}
		if got := d.engine.Stats().Bandwidth; got != c.want {
			t.Errorf("own %d: the engine's limit is %d, want %d", c.own, got, c.want)
		}
		stop(errors.New("the daemon was stopped"))
		<-d.Done()
		if _, err := d.SetBandwidth(1 << 20); !errors.Is(err, errOver) {
			t.Errorf("what is left for the next daemon is changed by this one: %v", err)
		}
	}
}
