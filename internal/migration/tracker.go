// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/migrated-vm/migrated/internal/printable"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// Tracker holds what the API shows of one migration. The migration updates it; any number of callers read it and wait
// for changes.
type Tracker struct {
	mu       sync.Mutex
	view     *migratedv1.Migration
	changed  chan struct{} // every update closes and replaces it
	times    Times
	entered  time.Time // when the current state began
	timeline timeline
	noted    *migratedv1.Report // what the report has beside view and timeline
	wasOver  bool               // see WasOver
	deleted  bool               // see Deleted
}

func newTracker(view *migratedv1.Migration) *Tracker {
	view.CreateTime = timestamppb.Now()
	view.UpdateTime = view.CreateTime
	view.Location = migratedv1.Location_LOCATION_UNKNOWN // nobody has looked yet
	if view.Progress == nil {
		view.Progress = &migratedv1.Progress{}
	}
	t := &Tracker{
		view: view, changed: make(chan struct{}), entered: time.Now(), noted: &migratedv1.Report{},
		times: Times{In: make(map[migratedv1.MigrationState]time.Duration)},
	}
	t.timeline.add(view, t.entered)
	return t
}

// Snapshot returns a copy of the migration, which the caller owns, and a channel that is closed at the next update.
func (t *Tracker) Snapshot() (*migratedv1.Migration, <-chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return proto.CloneOf(t.view), t.changed
}

func (t *Tracker) update(change func(*migratedv1.Migration)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.updateLocked(change)
}

// updateUnlessOver updates a migration that is not over. The end of a migration stays as it was reported.
func (t *Tracker) updateUnlessOver(change func(*migratedv1.Migration)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !Terminal(t.view.GetState()) {
		t.updateLocked(change)
	}
}

func (t *Tracker) updateLocked(change func(*migratedv1.Migration)) {
	was := t.view.GetState()
	change(t.view)
	t.recordStateChange(was)
	printable.Valid(t.view) // it may have text of QEMU and names that others chose
	t.view.UpdateTime = timestamppb.New(time.Now())
	close(t.changed)
	t.changed = make(chan struct{})
}

func (t *Tracker) setState(state migratedv1.MigrationState) {
	t.update(func(m *migratedv1.Migration) { m.State = state })
}

// setLocation records where the VM is.
func (t *Tracker) setLocation(location migratedv1.Location) {
	t.update(func(m *migratedv1.Migration) { m.Location = location })
}

// fail sets the state, the error and the location of the VM.
func (t *Tracker) fail(state migratedv1.MigrationState, err error, where whereabouts) {
	t.update(func(m *migratedv1.Migration) {
		m.State, m.Location = state, where.location
		m.Error = Describe(err)
		m.Error.VmStatus = where.words
	})
}

// Terminal says whether a migration in this state is over.
func Terminal(state migratedv1.MigrationState) bool {
	switch state {
	case migratedv1.MigrationState_MIGRATION_STATE_COMPLETED,
		migratedv1.MigrationState_MIGRATION_STATE_FAILED,
		migratedv1.MigrationState_MIGRATION_STATE_CANCELLED,
		migratedv1.MigrationState_MIGRATION_STATE_REHEARSED,
		migratedv1.MigrationState_MIGRATION_STATE_ENDED:
		return true
	default:
		return false
	}
}
