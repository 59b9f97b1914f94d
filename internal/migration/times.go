// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"maps"
	"time"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// Times is how long a migration was in which state, by the monotonic clock, as long as this daemon has known it.
type Times struct {
	// In is by state, with the time so far of the one that it is in. Those that are an end have none.
	In map[migratedv1.MigrationState]time.Duration
	// Paused is how long the VM has waited for a connection to its memory now, attempts to make one included; 0: it does not.
	Paused time.Duration
	// LongestPause is the longest that it has waited so.
	LongestPause time.Duration
	// Over is how long ago the migration ended; 0: it has not.
	Over time.Duration

	pausedAt time.Time // zero: it is not
}

// Times may be called at any time.
func (t *Tracker) Times() Times {
	t.mu.Lock()
	defer t.mu.Unlock()
	times, inState := t.times, time.Since(t.entered)
	times.In = maps.Clone(t.times.In)
	if Terminal(t.view.GetState()) {
		times.Over = inState
	} else {
		times.In[t.view.GetState()] += inState
	}
	if !times.pausedAt.IsZero() {
		times.Paused = time.Since(times.pausedAt)
		times.LongestPause = max(times.LongestPause, times.Paused)
	}
	return times
}

// waited is how long the VM has waited for a connection to its memory in all.
func (t *Times) waited() (all time.Duration) {
	for state, d := range t.In {
		if waits(state) {
			all += d
		}
	}
	return all
}

// keepTime is for who holds mu and has changed the state, perhaps, from was.
func (t *Tracker) keepTime(was migratedv1.MigrationState) {
	state := t.view.GetState()
	if state == was {
		return
	}
	now := time.Now()
	if !Terminal(was) {
		t.times.In[was] += now.Sub(t.entered)
	}
	t.entered = now
	t.timeline.add(t.view, now)
	switch {
	case !waits(state) && !t.times.pausedAt.IsZero():
		t.times.LongestPause = max(t.times.LongestPause, now.Sub(t.times.pausedAt))
		t.times.pausedAt = time.Time{}
	case !waits(state):
	case t.times.pausedAt.IsZero():
		t.times.pausedAt = now
	}
}

// waits says whether the VM's memory cannot come in this state. An attempt to connect again is no end of a pause.
func waits(state migratedv1.MigrationState) bool {
	return state == migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_PAUSED ||
		state == migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_RECOVER
}
