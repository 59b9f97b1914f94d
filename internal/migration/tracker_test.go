// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"testing"

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
	<-changed // hangs where the change is not told
	after, _ := tracker.Snapshot()
	if before.GetState() == after.GetState() || after.GetState() != migratedv1.MigrationState_MIGRATION_STATE_DEVICE {
		t.Errorf("state went from %v to %v", before.GetState(), after.GetState())
	}
	after.Id = "changed by its owner"
	if again, _ := tracker.Snapshot(); again.GetId() != "m1" {
		t.Error("a snapshot is not the caller's own")
	}
}
