// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/internal/qmp"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// discards asks QEMU, on the monitor that the source does not use, whether it empties the VM's memory when it ends.
// With a value it sets that first.
func (s *stage) discards(t *testing.T, set ...bool) (on bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	client, err := qmp.Dial(ctx, s.other)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Disconnect() //nolint:errcheck // only asked
	property := map[string]any{"path": "/objects/ram0", "property": "discard-data"}
	for _, value := range set {
		property["value"] = value
		if err := client.Do(ctx, "qom-set", property, nil); err != nil {
			t.Fatal(err)
		}
	}
	delete(property, "value")
	if err := client.Do(ctx, "qom-get", property, &on); err != nil {
		t.Fatal(err)
	}
	return on
}

// TestMemoryIsNotDiscarded: a VM whose memory backend has discard-data=on is handed over with it off, because QEMU may
// end before all memory has left, and then empties the file from which pages are served. A VM that goes on at the
// source has it on again.
func TestMemoryIsNotDiscarded(t *testing.T) {
	t.Run("handed over", func(t *testing.T) {
		s, asked := unanswered(t)
		s.discards(t, true)
		s.source.Start()
		<-asked
		if s.discards(t) {
			t.Error("QEMU would empty the memory when it ends")
		}
		s.discards(t, true) // as a daemon of an earlier version left it
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
		s.discards(t, true)
		s.source.Start()
		s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, "the destination fails")
		if !s.discards(t) {
			t.Error("QEMU no longer empties the memory when it ends")
		}
	})
}
