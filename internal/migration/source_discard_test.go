// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"testing"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// discards asks QEMU whether it empties the VM's memory when it ends.
func (s *stage) discards(t *testing.T) (on bool) {
	t.Helper()
	s.command(t, "qom-get", map[string]any{"path": "/objects/ram0", "property": "discard-data"}, &on)
	return on
}

// setDiscards sets that.
func (s *stage) setDiscards(t *testing.T, on bool) {
	t.Helper()
	s.command(t, "qom-set", map[string]any{"path": "/objects/ram0", "property": "discard-data", "value": on}, nil)
}

// TestMemoryIsNotDiscarded: a VM whose memory backend has discard-data=on is handed over with it off, because QEMU may
// end before all memory has left, and then empties the file from which pages are served. A VM that goes on at the
// source has it on again.
func TestMemoryIsNotDiscarded(t *testing.T) {
	t.Run("handed over", func(t *testing.T) {
		s, asked := unanswered(t)
		s.setDiscards(t, true)
		s.source.Start()
		<-asked
		if s.discards(t) {
			t.Error("QEMU would empty the memory when it ends")
		}
		s.setDiscards(t, true) // as a daemon of an earlier version left it
		s.source.cancel(errors.New("the daemon ends"))
		<-s.source.Done()
		s.takeUp(t)
		for view, changed := s.source.Snapshot(); view.GetState() != migratedv1.MigrationState_MIGRATION_STATE_HANDOVER; {
			<-changed
			view, changed = s.source.Snapshot()
		}
		if s.discards(t) {
			t.Error("after a restart of the daemon QEMU would empty the memory when it ends")
		}
	})
	t.Run("fails", func(t *testing.T) {
		var s *stage
		s = newStageWith(t, t.Context(), &peer{load: func(context.Context) error {
			if s.discards(t) {
				t.Error("QEMU would empty the memory when it ends")
			}
			return errors.New("the destination fails")
		}})
		s.setDiscards(t, true)
		s.source.Start()
		s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, "the destination fails")
		if !s.discards(t) {
			t.Error("QEMU no longer empties the memory when it ends")
		}
	})
}
