// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

func TestCheckBudgets(t *testing.T) {
	for _, c := range []struct {
		freeze, pause *durationpb.Duration
		wrong         string
	}{
		{nil, nil, ""},
		{durationpb.New(100 * time.Millisecond), durationpb.New(0), ""},
		{durationpb.New(2 * time.Minute), durationpb.New(time.Minute), ""},
		{durationpb.New(0), nil, "freeze_limit"},
		{durationpb.New(3 * time.Minute), nil, "freeze_limit"},
		{nil, durationpb.New(-1), "early_pause_limit"},
		{nil, durationpb.New(time.Hour), "early_pause_limit"},
		{&durationpb.Duration{Seconds: 1, Nanos: -1}, nil, "freeze_limit"},
	} {
		err := CheckBudgets(&migratedv1.MigrationSpec{FreezeLimit: c.freeze, EarlyPauseLimit: c.pause})
		if (err != nil) != (c.wrong != "") || err != nil && !strings.HasPrefix(err.Error(), c.wrong) {
			t.Errorf("freeze %v, pause %v: %v", c.freeze, c.pause, err)
		}
	}
	far := &migratedv1.MigrationSpec{FreezeLimit: durationpb.New(time.Hour)} // as from a peer that did not check it
	if got := freezeLimit(far); got != longestFreeze {
		t.Errorf("a peer's limit is %v", got)
	}
}

// The source continues a VM that has stood still for freeze_limit.
func TestFreezeLimit(t *testing.T) {
	p := &peer{run: runAtOnce, spec: &migratedv1.MigrationSpec{FreezeLimit: durationpb.New(shortestFreeze)}}
	p.load = func(ctx context.Context) error {
		<-ctx.Done()
		return ctx.Err()
	}
	s := newStageWith(t, t.Context(), p)
	s.source.Start()
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, "did not move within "+shortestFreeze.String())
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, "the VM runs on the source")
	if view, _ := s.source.Snapshot(); view.GetError().GetReason() != migratedv1.Reason_REASON_LIMIT_MISSED {
		t.Errorf("the reason is %v", view.GetError().GetReason())
	}
	if p.runs != 0 || !s.vmRuns(t) || s.handedOver(t) {
		t.Errorf("%d hand-overs", p.runs)
	}
}

// The source does not repeat an early load after the VM has stood still for early_pause_limit.
func TestEarlyPauseLimit(t *testing.T) {
	for name, c := range map[string]struct {
		limit *durationpb.Duration
		asked int
		says  string
	}{
		"none": {durationpb.New(0), 2, "longer than early_pause_limit (0s)"}, // the second call carries no state
		"long": {durationpb.New(time.Minute), earlyTries, "a page is missing"},
	} {
		t.Run(name, func(t *testing.T) {
			p := &peer{run: runAtOnce, early: true, earlyMisses: true, spec: &migratedv1.MigrationSpec{EarlyPauseLimit: c.limit}}
			var devices []string
			for range 8 {
				devices = append(devices, "-device", "virtio-rng-pci")
			}
			s := newStageWith(t, t.Context(), p, devices...)
			s.source.Start()
			s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, "")
			view, _ := s.source.Snapshot()
			early := view.GetEarlyLoad()
			if p.earlyCalls < c.asked || early.GetLoaded() ||
				!strings.Contains(early.GetReason(), c.says) || early.GetPause().AsDuration() <= 0 {
				t.Errorf("asked %d times: %v", p.earlyCalls, early)
			}
			if name == "none" && p.earlyCalls != c.asked {
				t.Errorf("it was tried again: asked %d times", p.earlyCalls)
			}
		})
	}
}
