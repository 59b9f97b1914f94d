// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/internal/qemu"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// If the VM has changed between prepare and Start, the source prepares afresh, while the VM runs.
func TestRenew(t *testing.T) {
	for name, c := range map[string]struct {
		change   func(t *testing.T, s *stage)
		prepares int
	}{
		"all as it was":      {func(*testing.T, *stage) {}, 1},
		"an old early state": {func(_ *testing.T, s *stage) { s.source.earlySavedAt = time.Now().Add(-time.Hour) }, 2},
		"a device was plugged": {func(t *testing.T, s *stage) {
			s.command(t, "device_add", map[string]string{"driver": "usb-tablet", "id": "late", "bus": "usb.0"}, nil)
		}, 2},
	} {
		t.Run(name, func(t *testing.T) {
			p := &peer{run: runAtOnce}
			s := newEarlyStage(t, p)
			before, _ := s.source.Snapshot()
			c.change(t, s)
			p.load = func(context.Context) error {
				if kept := earlyRoom.taken.Load(); kept != 0 {
					t.Errorf("%d bytes of early states are kept after the last that needed them", kept)
				}
				return nil
			}
			s.source.Start()
			s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, "")
			view, _ := s.source.Snapshot()
			if early := view.GetEarlyLoad(); p.prepareCalls != c.prepares || !early.GetLoaded() ||
				p.runRequest == nil || p.runs != 0 {
				t.Errorf("prepared %d times: %v", p.prepareCalls, early)
			}
			if again := view.GetEarlyLoad().GetPause().AsDuration() >
				before.GetEarlyLoad().GetPause().AsDuration(); again != (c.prepares > 1) {
				t.Errorf("pauses of %v, then %v", before.GetEarlyLoad().GetPause(), view.GetEarlyLoad().GetPause())
			}
		})
	}
}

// TestAttemptsAreApart: a source that begins another attempt has QEMU's monitor from that, and not the connection that
// replaced a lost one in the attempt before, which is closed.
func TestAttemptsAreApart(t *testing.T) {
	dir := t.TempDir()
	startQEMU(t, ramFile(t), filepath.Join(dir, "qmp.sock"), filepath.Join(dir, "other.sock"))
	vm, err := qemu.Attach(t.Context(), filepath.Join(dir, "other.sock"))
	if err != nil {
		t.Fatal(err)
	}
	s, _ := newSource(t.Context(), SourceConfig{Spec: &migratedv1.MigrationSpec{}, Log: slog.New(slog.DiscardHandler)})
	s.reconnected = vm
	s.moveTo(stopAsked)
	s.gaveUpDisks = true
	s.discards = []string{"ram0"}
	close(s.stopped)
	s.reset()
	if s.monitor() != nil || s.gaveUpDisks || s.stopTried() || isClosed(s.stopped) {
		t.Errorf("the monitor is %v, the disks were given up: %t, the VM was stopped: %t",
			s.monitor(), s.gaveUpDisks, s.stopTried())
	}
	if len(s.discards) != 1 { // it is still off, and a later attempt does not see that it was on
		t.Error("it is forgotten that QEMU is to empty its memory again when it ends")
	}
	s.undoKeepMemory() // as when the next attempt cannot connect to QEMU
}
