// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"log/slog"
	"testing"

	"google.golang.org/protobuf/proto"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

func TestTrackerTellsOfEveryChange(t *testing.T) {
	tracker := newTracker(&migratedv1.Migration{Id: "m1"})
	before, changed := tracker.Snapshot()
	select {
	case <-changed:
		t.Fatal("told of a change before there was one")
	default:
	}
	tracker.setState(migratedv1.MigrationState_MIGRATION_STATE_DEVICE)
	<-changed // hangs if the change is not announced
	after, _ := tracker.Snapshot()
	if before.GetState() == after.GetState() || after.GetState() != migratedv1.MigrationState_MIGRATION_STATE_DEVICE {
		t.Errorf("state went from %v to %v", before.GetState(), after.GetState())
	}
	after.Id = "changed by its owner"
	if again, _ := tracker.Snapshot(); again.GetId() != "m1" {
		t.Error("a snapshot is not the caller's own")
	}
}

// idleSource returns a source on which nothing runs, and its context.
func idleSource(t *testing.T) (*Source, context.Context) {
	t.Helper()
	return newSource(t.Context(), SourceConfig{
		ID: "m1", Spec: &migratedv1.MigrationSpec{}, Log: slog.New(slog.DiscardHandler),
	})
}

// TestOverBeforeItsStart: Start does not change the reported end of a migration that failed while it was prepared.
func TestOverBeforeItsStart(t *testing.T) {
	s, _ := idleSource(t)
	s.setState(migratedv1.MigrationState_MIGRATION_STATE_FAILED)
	reported, _ := s.Snapshot()
	s.Start()
	if after, _ := s.Snapshot(); !proto.Equal(after, reported) {
		t.Errorf("it is %v, and was %v", after, reported)
	}
}
