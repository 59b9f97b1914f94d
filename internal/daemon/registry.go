// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/migrated-vm/migrated/internal/listing"
	"github.com/migrated-vm/migrated/internal/metrics"
	"github.com/migrated-vm/migrated/internal/migration"
	"github.com/migrated-vm/migrated/internal/turns"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// keptMigrations is how many migrations of each role are remembered.
const keptMigrations = 256

// mostNeeded is how many migrations to this host are remembered if they must not be forgotten: a peer must not fill the
// daemon's memory.
var mostNeeded = 16 * keptMigrations // changed by a test

// mostWaiting is how many migrations to this host may wait for a place.
const mostWaiting = 1024

// A registry keeps the migrations of this host. A host can be both source and
// destination of the same migration, so there is a map for each role.
type registry struct {
	mu           sync.Mutex
	sources      map[string]*migration.Source
	destinations map[string]*migration.Destination
	senders      map[string]string              // callerID of the source, for each destination but those taken up
	left         map[string]error               // migrations to this host that could not be taken up, and why
	leftovers    map[string]*migration.Leftover // migrations to this host and away from it that could not be taken up
	stopping     bool                           // no migration may be added any more
	forgotten    metrics.Totals                 // counts of migrations that were removed
	shown        *listing.List                  // all migrations, for List and WatchList
	entries      map[tracked]*listing.Entry     // of shown

	turn map[string]bool     // the sources whose turn has come
	kept map[*place]struct{} // places that are reserved for migrations to this host
	// The queues of migrations that wait for their turn. Their locks are taken before mu.
	outgoing, incoming turns.Queue
}

// A place is reserved for a migration until its source calls PrepareIncoming.
type place struct{ id, sender string }

func newRegistry() *registry {
	return &registry{
		sources:      make(map[string]*migration.Source),
		destinations: make(map[string]*migration.Destination),
		senders:      make(map[string]string),
		shown:        listing.New(time.Now),
		entries:      make(map[tracked]*listing.Entry),
		turn:         make(map[string]bool),
		kept:         make(map[*place]struct{}),
		incoming:     turns.Queue{Most: mostWaiting},
	}
}

// A tracked is one side of a migration: a Source, a Destination or a Leftover.
type tracked interface {
	Snapshot() (*migratedv1.Migration, <-chan struct{})
	Done() <-chan struct{}
	Times() migration.Times
	Report() *migratedv1.Report
	WasOver() bool
	Delete(ctx context.Context) error
	Deleted() bool
}

func (r *registry) source(id string) *migration.Source {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.sources[id]
}

func (r *registry) destination(id string) *migration.Destination {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.destinations[id]
}

// whyLeft says why a migration to this host could not be taken up; nil: there is none of that id.
func (r *registry) whyLeft(id string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.left[id]
}

// find returns the source of a migration, or else its destination, or else its leftover; nil: there is none.
func (r *registry) find(id string) tracked {
	if s := r.source(id); s != nil {
		return s
	}
	if d := r.destination(id); d != nil {
		return d
	}
	if l := r.leftover(id); l != nil {
		return l
	}
	return nil
}

// findAs returns one side of a migration. With MIGRATION_ROLE_UNSPECIFIED it is find.
func (r *registry) findAs(id string, role migratedv1.MigrationRole) tracked {
	if role == migratedv1.MigrationRole_MIGRATION_ROLE_UNSPECIFIED {
		return r.find(id)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if s := r.sources[id]; s != nil && role == migratedv1.MigrationRole_MIGRATION_ROLE_SOURCE {
		return s
	}
	if d := r.destinations[id]; d != nil && role == migratedv1.MigrationRole_MIGRATION_ROLE_DESTINATION {
		return d
	}
	return nil
}

// leftover returns the migration of that id that an earlier run of this daemon left and that could not be taken up;
// nil: there is none.
func (r *registry) leftover(id string) *migration.Leftover {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.leftovers[id]
}

// errStopping says that the daemon is about to end: a migration that began now would be left without it.
var errStopping = migration.WithRemedy(errors.New("the daemon is stopping"), "try again when it runs again")

// addSource returns the source with that id, and adds one that create makes if there
// is none. If another migration of the VM is not over, busy is its id, and s is nil.
// The error is errStopping.
func (r *registry) addSource(
	id, vm string, create func() *migration.Source,
) (s *migration.Source, busy string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if s := r.sources[id]; s != nil {
		return s, "", nil
	}
	if r.stopping {
		return nil, "", errStopping
	}
	if busy := r.underWayLocked(vm); busy != "" {
		return nil, busy, nil
	}
	forgetOld(r, r.sources)
	s = create()
	r.sources[id] = s
	r.show(s)
	return s, "", nil
}

// underWay returns the id of the migration of a VM that is not over; empty: none.
func (r *registry) underWay(vm string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.underWayLocked(vm)
}

// underWayLocked is underWay for callers that hold mu.
func (r *registry) underWayLocked(vm string) string {
	for id, s := range r.sources {
		if view, _ := s.Snapshot(); view.GetSpec().GetVm() == vm && !isDone(s) {
			return id
		}
	}
	return ""
}

// releaseTime is how long a source may take to release its VM after its migration has reached a terminal state.
const releaseTime = 5 * time.Second

// awaitRelease waits until a source whose migration has reached a terminal state has also released its VM, so that a
// client that saw the end can begin the next migration at once. It returns false if the migration is under way, or if
// releaseTime has passed.
func (r *registry) awaitRelease(id string) bool {
	s := r.source(id)
	if s == nil {
		return true
	}
	if view, _ := s.Snapshot(); !migration.Terminal(view.GetState()) {
		return false
	}
	select {
	case <-s.Done():
		return true
	case <-time.After(releaseTime):
		return false
	}
}

// errUnheard says that no more migrations can be remembered.
var errUnheard = migration.WithRemedy(
	errors.New("too many migrations to the destination have ended without their sources knowing it"),
	"see that the daemons of these sources run and reach the destination, then delete the migrations there "+
		"(migrated delete)")

// errIDTaken says that another migration has the id, and is under way or must not be forgotten.
var errIDTaken = errors.New("its id is taken")

// addDestination adds the destination that create makes, if fewer than most are under way, and fewer than half of that
// from the same sender. It replaces one of the same id that is over and not needed any more, so that an id can be used
// again after a failure. forgotten are the ids of old migrations that were removed. The errors are errIDTaken,
// *crowdedError, errUnheard and errStopping.
func (r *registry) addDestination(
	id, sender string, most int, create func() *migration.Destination,
) (d *migration.Destination, forgotten []string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stopping {
		return nil, nil, errStopping
	}
	old := r.destinations[id]
	if err := r.checkFree(id, old); err != nil {
		return nil, nil, err
	}
	for p := range r.kept {
		if p.id == id && p.sender == sender {
			delete(r.kept, p)
		}
	}
	if err := r.crowded(sender, most); err != nil {
		return nil, nil, err
	}
	if old != nil {
		old.Forget()
		r.drop(old)
		delete(r.destinations, id) // forgetOld may not find it again
	}
	forgotten = forgetOld(r, r.destinations)
	for _, over := range forgotten {
		delete(r.senders, over)
	}
	if len(r.destinations) >= mostNeeded {
		return nil, forgotten, errUnheard
	}
	d = create()
	r.destinations[id], r.senders[id] = d, sender
	r.show(d)
	return d, forgotten, nil
}

// checkFree refuses an id that another migration to this host has: old, unless that is nil, or one that could not be
// taken up. The caller holds mu.
func (r *registry) checkFree(id string, old *migration.Destination) error {
	why := r.left[id]
	if old != nil && !isDone(old) {
		return fmt.Errorf("%w: a migration %s to the destination is under way", errIDTaken, id)
	} else if old != nil {
		why = old.Needed()
	}
	if why != nil { // whose reason and remedy are not the new migration's
		return fmt.Errorf("%w by an earlier migration %s to the destination: %s", errIDTaken, id, why.Error())
	}
	return nil
}

// hasRoom returns the *crowdedError that addDestination would.
func (r *registry) hasRoom(sender string, most int) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.crowded(sender, most)
}

// crowded is hasRoom for callers that hold mu.
func (r *registry) crowded(sender string, most int) error {
	all, theirs := 0, 0
	for id, d := range r.destinations {
		if isDone(d) {
			continue
		}
		all++
		if r.senders[id] == sender {
			theirs++
		}
	}
	for p := range r.kept {
		all++
		if p.sender == sender {
			theirs++
		}
	}
	if half := (most + 1) / 2; all >= most {
		return &crowdedError{most: most}
	} else if theirs >= half {
		return &crowdedError{most: half, sender: sender}
	}
	return nil
}

// takeUp adds the migrations that an earlier run of the daemon left. left are those to this host that could not be
// taken up, records those away from it.
func (r *registry) takeUp(
	sources []*migration.Source, destinations []*migration.Destination, left, records map[string]error,
) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.left = left
	r.leftovers = make(map[string]*migration.Leftover)
	for id, why := range left {
		r.leftovers[id] = migration.NewLeftover(id, migratedv1.MigrationRole_MIGRATION_ROLE_DESTINATION, why)
	}
	for id, why := range records { // they replace those of the same id in left: they are about VMs of this host
		r.leftovers[id] = migration.NewLeftover(id, migratedv1.MigrationRole_MIGRATION_ROLE_SOURCE, why)
	}
	for _, s := range sources {
		view, _ := s.Snapshot()
		r.sources[view.GetId()], r.turn[view.GetId()] = s, true
		r.show(s)
	}
	for _, d := range destinations {
		view, _ := d.Snapshot()
		r.destinations[view.GetId()] = d
		r.show(d)
	}
	for _, l := range r.leftovers {
		r.show(l)
	}
}

func (r *registry) all() []tracked {
	r.mu.Lock()
	defer r.mu.Unlock()
	var all []tracked
	for _, s := range r.sources {
		all = append(all, s)
	}
	for _, d := range r.destinations {
		all = append(all, d)
	}
	return all
}

// active counts the migrations that are not over.
func (r *registry) active() int {
	n := 0
	for _, t := range r.all() {
		if !isDone(t) {
			n++
		}
	}
	return n
}

// stop returns when every migration is over, and lets no other one begin.
func (r *registry) stop() {
	r.mu.Lock()
	r.stopping = true
	r.mu.Unlock()
	for _, t := range r.all() {
		<-t.Done()
	}
}

func isDone(t tracked) bool {
	select {
	case <-t.Done():
		return true
	default:
		return false
	}
}

// forgetOld makes room for one more migration in a map of r: it removes the oldest that are over and not needed any
// more, and returns their ids. The caller holds mu.
func forgetOld[T interface {
	tracked
	Needed() error
}](r *registry, migrations map[string]T) (forgotten []string) {
	for len(migrations) >= keptMigrations {
		oldest, found := "", false
		var oldestView *migratedv1.Migration
		for id, t := range migrations {
			if !isDone(t) || t.Needed() != nil {
				continue
			}
			view, _ := t.Snapshot()
			if !found || view.GetUpdateTime().AsTime().Before(oldestView.GetUpdateTime().AsTime()) {
				oldest, oldestView, found = id, view, true
			}
		}
		if !found {
			break
		}
		r.drop(migrations[oldest])
		delete(migrations, oldest)
		forgotten = append(forgotten, oldest)
	}
	return forgotten
}
