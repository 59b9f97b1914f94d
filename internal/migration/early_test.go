// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// haltingFirmware returns the file of a firmware that halts at once.
func haltingFirmware(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "firmware")
	if err := os.WriteFile(path, bytes.Repeat([]byte{0xf4}, 64<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// newEarlyStage returns a stage whose peer has loaded the device state before the VM stops. The VM has many devices,
// so that saving them takes long enough to look at its memory meanwhile. No firmware sets them up meanwhile.
func newEarlyStage(t *testing.T, p *peer, devices ...string) *stage {
	t.Helper()
	p.early = true
	for range 8 {
		devices = append(devices, "-device", "virtio-rng-pci")
	}
	devices = append(devices, "-device", "qemu-xhci,id=usb", "-bios", haltingFirmware(t))
	s := newStageWith(t, t.Context(), p, devices...)
	for view, changed := s.source.Snapshot(); !view.GetPrepared(); view, changed = s.source.Snapshot() {
		if Terminal(view.GetState()) {
			t.Fatal(view.GetError())
		}
		<-changed
	}
	view, _ := s.source.Snapshot()
	if early := view.GetEarlyLoad(); !early.GetLoaded() || early.GetPause().AsDuration() <= 0 {
		t.Fatalf("early load %v", early)
	}
	return s
}

// After an early load, the destination is told to run the VM with the last message of the changes. The record is
// committed before that.
func TestHandOverInHalfARoundTrip(t *testing.T) {
	p := &peer{run: runAtOnce}
	s := newEarlyStage(t, p)
	recorded := false
	p.load = func(context.Context) error { recorded = s.handedOver(t); return nil }
	s.source.Start()
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, "")
	view, _ := s.source.Snapshot()
	if p.runs != 0 || !p.runRequest.GetResume() || p.runRequest.GetStoppedFor().AsDuration() <= 0 ||
		!recorded || p.aborted {
		t.Errorf("told %v, which was written down: %t; asked again %d times; aborted %t",
			p.runRequest, recorded, p.runs, p.aborted)
	}
	if early := view.GetEarlyLoad(); p.bytes == 0 || p.bytes > early.GetBytes()/4 {
		t.Errorf("%d bytes have changed of %d", p.bytes, early.GetBytes())
	}
}

// The source repeats Run until it is answered. The VM stays stopped meanwhile: it may run at the destination.
func TestHandOverWithoutAnAnswer(t *testing.T) {
	for name, outcome := range map[string]struct {
		of    codes.Code // of the load, after the destination was told to run
		run   error      // then, of Run
		runs  bool       // at the source in the end
		asked int
	}{
		"cut":                         {codes.Unavailable, nil, false, 1},
		"late":                        {codes.DeadlineExceeded, nil, false, 1},
		"given up before":             {codes.FailedPrecondition, status.Error(codes.Aborted, "QEMU died"), true, 1},
		"promises not to run":         {codes.Aborted, nil, true, 0},
		"cut and promises not to run": {codes.Unavailable, status.Error(codes.Aborted, "QEMU died"), true, 1},
	} {
		t.Run(name, func(t *testing.T) {
			p := &peer{run: func(attempt int) (*migratedv1.RunResponse, error) {
				if outcome.run != nil {
					return nil, outcome.run
				}
				return runAtOnce(attempt)
			}}
			s := newEarlyStage(t, p)
			p.load = func(context.Context) error { return status.Error(outcome.of, "so it is") }
			s.source.Start()
			want, words := migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, ""
			if outcome.runs {
				want, words = migratedv1.MigrationState_MIGRATION_STATE_FAILED, "the VM runs on the source"
			}
			s.expect(t, want, words)
			if p.runRequest == nil || p.runs != outcome.asked || p.aborted != outcome.runs || s.handedOver(t) {
				t.Errorf("told %v, asked %d times, aborted %t", p.runRequest, p.runs, p.aborted)
			}
			if outcome.runs && !s.vmRuns(t) {
				t.Error("the VM does not run")
			}
		})
	}
}

// A VM that somebody continues while its state is saved is not handed over, although the record is committed already.
func TestContinuedWhileSaved(t *testing.T) {
	p := &peer{run: runAtOnce}
	s := newEarlyStage(t, p)
	close(s.source.continuedByOther) // as guardStopped finds out
	s.source.Start()
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, "the VM runs on the source")
	if p.runRequest != nil || p.runs != 0 || !s.vmRuns(t) || s.handedOver(t) {
		t.Errorf("told %v, asked %d times", p.runRequest, p.runs)
	}
}

// A byteLimit gives out no more bytes than it has.
func TestByteLimit(t *testing.T) {
	r := byteLimit{most: 10}
	if err := r.take(7); err != nil {
		t.Error(err)
	}
	if err := r.take(4); err == nil {
		t.Error("11 of 10 bytes were taken")
	}
	r.give(7)
	if err := r.take(10); err != nil {
		t.Error(err)
	}
}

// The devices of a VM have changed too much since the early load. The VM goes on, and the same migration moves it
// without an early load.
func TestStartOver(t *testing.T) {
	p := &peer{run: runAtOnce}
	s := newEarlyStage(t, p)
	first := &s.source.earlyState.sections[0]
	first.Bytes = first.Bytes[1:] // the source owns it only after Start
	paused := func() time.Duration {
		view, _ := s.source.Snapshot()
		return view.GetEarlyLoad().GetPause().AsDuration()
	}
	before := paused()
	s.source.Start()
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, "")
	view, _ := s.source.Snapshot()
	early := view.GetEarlyLoad()
	if early.GetLoaded() || !strings.Contains(early.GetReason(), first.Name) || paused() <= before {
		t.Errorf("early load %v, a pause of %v before", early, before)
	}
	if size := view.GetProgress().GetBytesDeviceState(); p.runRequest != nil || p.runs != 1 ||
		!p.aborted || size < 100_000 {
		t.Errorf("told %v, asked %d times, aborted %t, %d bytes loaded", p.runRequest, p.runs, p.aborted, size)
	}
}

// TestBrokenEarlyAnswers: a destination that speaks of loading a state that it was not sent fails the migration. It is
// not asked without end, and the VM goes on.
func TestBrokenEarlyAnswers(t *testing.T) {
	missing := &migratedv1.LoadEarlyStateResponse{Missed: []*migratedv1.Memory{{}}}
	for name, withoutState := range map[string]*migratedv1.LoadEarlyStateResponse{
		"memory is missing": missing,
		"it is loaded":      {Loaded: true},
	} {
		t.Run(name, func(t *testing.T) {
			p := &peer{run: runAtOnce, early: true, earlyAnswer: func(sent bool) *migratedv1.LoadEarlyStateResponse {
				if sent {
					return missing
				}
				return withoutState
			}}
			s := newStageWith(t, t.Context(), p)
			s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, "a state that it was not sent")
			if view, _ := s.source.Snapshot(); view.GetError().GetReason() != migratedv1.Reason_REASON_PROTOCOL {
				t.Errorf("it says %v", view.GetError())
			}
			if p.earlyCalls > earlyTries+1 || !s.vmRuns(t) {
				t.Errorf("it was asked %d times", p.earlyCalls)
			}
		})
	}
}

// TestAppendMissed: pages that a destination names again, or that are too many to be copied, are not kept.
func TestAppendMissed(t *testing.T) {
	var pages []*migratedv1.Memory
	for i := range uint64(2 * earlyPagesMost / smallPage) {
		pages = append(pages, &migratedv1.Memory{Offset: i * smallPage})
	}
	if got := appendMissed(appendMissed(nil, pages[:3]), pages[:4]); len(got) != 4 {
		t.Errorf("%d pages of 4 are kept", len(got))
	}
	if got := len(appendMissed(nil, pages)) * smallPage; got <= earlyPagesMost || got > earlyPagesMost+smallPage {
		t.Errorf("%d bytes are kept", got)
	}
}
