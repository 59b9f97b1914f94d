// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"testing"
	"testing/synctest"
	"time"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// TestTimes: an attempt to reconnect does not restart a pause, and the time in an end state is not counted.
func TestTimes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tracker := newTracker(&migratedv1.Migration{Id: "m1", State: migratedv1.MigrationState_MIGRATION_STATE_SETUP})
		const (
			active  = migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_ACTIVE
			paused  = migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_PAUSED
			mending = migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_RECOVER
		)
		for _, state := range []migratedv1.MigrationState{active, paused, mending, paused} {
			time.Sleep(time.Second)
			tracker.setState(state)
		}
		time.Sleep(time.Second)
		got := tracker.Times()
		if got.Paused != 3*time.Second || got.In[paused] != 2*time.Second || got.In[active] != time.Second || got.Over != 0 {
			t.Errorf("while it is paused: %+v", got)
		}
		tracker.setState(active)
		if got := tracker.Times(); got.Paused != 0 {
			t.Errorf("pages come, and the pause has lasted %v", got.Paused)
		}
		tracker.setState(migratedv1.MigrationState_MIGRATION_STATE_COMPLETED)
		time.Sleep(time.Minute)
		if got := tracker.Times(); got.Over != time.Minute || len(got.In) != 4 {
			t.Errorf("when it is over: %+v", got)
		}
	})
}
