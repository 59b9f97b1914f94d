// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"maps"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// Times says how long a migration was in each state. It uses the monotonic clock and starts when this daemon first
// knew of the migration.
type Times struct {
	// In has the time in each state, including the time so far in the current one. States that end a migration have
	// no entry.
	In map[migratedv1.MigrationState]time.Duration
	// Paused is how long the VM's memory has been unreachable now, attempts to reconnect included. 0: it is
	// reachable.
	Paused time.Duration
	// LongestPause is the longest time that the memory was unreachable.
	LongestPause time.Duration
	// Over is how long ago the migration ended; 0: it has not.
	Over time.Duration

	pausedAt time.Time // when the current pause began; zero: no pause
}

// Times returns the times up to now. It may be called at any time.
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

// totalPause returns the sum of all pauses.
func (t *Times) totalPause() (all time.Duration) {
	for state, d := range t.In {
		if memoryUnreachable(state) {
			all += d
		}
	}
	return all
}

// recordStateChange records a change of the state since was, if there was one. The caller holds mu.
func (t *Tracker) recordStateChange(was migratedv1.MigrationState) {
	state := t.view.GetState()
	if state == was {
		return
	}
	now := time.Now()
	if !Terminal(was) {
		t.times.In[was] += now.Sub(t.entered)
	}
	if Terminal(state) && !Terminal(was) && !t.wasOver { // else an earlier run of the daemon may have written it down
		t.view.EndTime = timestamppb.New(now)
	}
	t.entered = now
	t.timeline.add(t.view, now)
	switch {
	case !memoryUnreachable(state) && !t.times.pausedAt.IsZero():
		t.times.LongestPause = max(t.times.LongestPause, now.Sub(t.times.pausedAt))
		t.times.pausedAt = time.Time{}
	case !memoryUnreachable(state):
	case t.times.pausedAt.IsZero():
		t.times.pausedAt = now
	}
}

// memoryUnreachable says whether the VM's memory is unreachable in this state. An attempt to reconnect does not end a
// pause.
func memoryUnreachable(state migratedv1.MigrationState) bool {
	return state == migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_PAUSED ||
		state == migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_RECOVER
}
