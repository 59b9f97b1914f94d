// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/migrated-vm/migrated/internal/metrics"
	"github.com/migrated-vm/migrated/internal/migration"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// keptMigrations is how many migrations that are over are remembered.
const keptMigrations = 256

// A registry keeps the migrations of this host. A host can be source and
// destination of the same migration, so that the role belongs to the key.
type registry struct {
	mu           sync.Mutex
	sources      map[string]*migration.Source
	destinations map[string]*migration.Destination
	senders      map[string]string              // of the destinations' sources; none of those that were taken up
	left         map[string]error               // migrations to this host that could not be taken up, and why
	leftovers    map[string]*migration.Leftover // these, and those away from it
	forgotten    metrics.Totals                 // of the migrations that are not here any more
}

func newRegistry() *registry {
	return &registry{
		sources:      make(map[string]*migration.Source),
		destinations: make(map[string]*migration.Destination),
		senders:      make(map[string]string),
	}
}

// A tracked is either side of a migration.
type tracked interface {
	Snapshot() (*migratedv1.Migration, <-chan struct{})
	Done() <-chan struct{}
	Times() migration.Times
	Report() *migratedv1.Report
	WasOver() bool
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

// whyLeft says why a migration to this host could not be taken up; nil where there is none of that id.
func (r *registry) whyLeft(id string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.left[id]
}

// find prefers the source, which is what its operator asked for.
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

// findAs is find of one side; any: of MIGRATION_ROLE_UNSPECIFIED.
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

// leftover is what an earlier run of this daemon left of that id, and could not be taken up.
func (r *registry) leftover(id string) *migration.Leftover {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.leftovers[id]
}

// addSource returns the source with that id, made by create where there is none.
// busy is a migration of the same VM that is not over.
func (r *registry) addSource(id, vm string, create func() *migration.Source) (s *migration.Source, busy string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if s := r.sources[id]; s != nil {
		return s, ""
	}
	if busy := r.busy(vm); busy != "" {
		return nil, busy
	}
	forgetOld(r.sources, &r.forgotten)
	s = create()
	r.sources[id] = s
	return s, ""
}

// under says which migration of that VM is not over; empty: none.
func (r *registry) under(vm string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.busy(vm)
}

// busy is for who holds mu.
func (r *registry) busy(vm string) string {
	for id, s := range r.sources {
		if view, _ := s.Snapshot(); view.GetSpec().GetVm() == vm && !isDone(s) {
			return id
		}
	}
	return ""
}

// letGoTime is what a source that has said how its migration ended may take to let go of its VM.
const letGoTime = 5 * time.Second

// letGo waits for a source whose migration has ended, but which has not let go of everything. It says false where the
// migration goes on: who was told of the end may begin the next one at once.
func (r *registry) letGo(id string) bool {
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
	case <-time.After(letGoTime):
		return false
	}
}

// errIDTaken says that a migration with the same id is under way.
var errIDTaken = errors.New("its id is taken")

// A crowdedError says that as many migrations come to this host as may.
type crowdedError struct {
	most   int
	sender string // whose they are; empty: everybody's
}

func (e *crowdedError) Error() string {
	if e.sender == "" {
		return fmt.Sprintf("%d migrations to this host are under way, as many as may be at once", e.most)
	}
	return fmt.Sprintf("%d migrations from %s to this host are under way, half of what may be at once, and the rest is for others",
		e.most, e.sender)
}

const remedyCrowded = "start this one when another is over, or raise max_incoming in the destination's configuration"

// addDestination adds the one that create makes, where sender and all others have fewer than most under way: each sender
// may have half of them. One that is over makes room, so that an id can be used again after a failure. forgotten are the
// ids that nobody is told about any more. The errors are errIDTaken and *crowdedError.
func (r *registry) addDestination(id, sender string, most int, create func() *migration.Destination) (d *migration.Destination, forgotten []string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	old := r.destinations[id]
	if old != nil && !isDone(old) {
		return nil, nil, errIDTaken
	}
	if err := r.crowded(sender, most); err != nil {
		return nil, nil, err
	}
	forgotten = forgetOld(r.destinations, &r.forgotten)
	for _, over := range forgotten {
		delete(r.senders, over)
	}
	if old != nil {
		old.Forget()
		view, _ := old.Snapshot()
		addTotals(&r.forgotten, old, view)
	}
	d = create()
	r.destinations[id], r.senders[id] = d, sender
	return d, forgotten, nil
}

// hasRoom fails with a *crowdedError where addDestination would.
func (r *registry) hasRoom(sender string, most int) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.crowded(sender, most)
}

// crowded is for who holds mu.
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
	if half := (most + 1) / 2; all >= most {
		return &crowdedError{most: most}
	} else if theirs >= half {
		return &crowdedError{most: half, sender: sender}
	}
	return nil
}

// takeUp adds migrations that an earlier run of the daemon left; left are those to this host that could not be taken up,
// records those away from it.
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
	for id, why := range records { // the source's, where a host is both: it is about a VM of this host
		r.leftovers[id] = migration.NewLeftover(id, migratedv1.MigrationRole_MIGRATION_ROLE_SOURCE, why)
	}
	for _, s := range sources {
		view, _ := s.Snapshot()
		r.sources[view.GetId()] = s
	}
	for _, d := range destinations {
		view, _ := d.Snapshot()
		r.destinations[view.GetId()] = d
	}
}

// list returns all migrations, newest first.
func (r *registry) list() []*migratedv1.Migration {
	r.mu.Lock()
	defer r.mu.Unlock()
	var views []*migratedv1.Migration
	for _, s := range r.sources {
		view, _ := s.Snapshot()
		views = append(views, view)
	}
	for _, d := range r.destinations {
		view, _ := d.Snapshot()
		views = append(views, view)
	}
	for _, l := range r.leftovers {
		view, _ := l.Snapshot()
		views = append(views, view)
	}
	slices.SortFunc(views, func(a, b *migratedv1.Migration) int {
		return cmp.Or(
			b.GetCreateTime().AsTime().Compare(a.GetCreateTime().AsTime()),
			cmp.Compare(a.GetId(), b.GetId()))
	})
	return views
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

// wait returns when every migration is over.
func (r *registry) wait() {
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

// forgetOld makes room for one more: it drops the oldest that are over, and says which. What was counted of them goes
// into totals.
func forgetOld[T tracked](migrations map[string]T, totals *metrics.Totals) (forgotten []string) {
	for len(migrations) >= keptMigrations {
		oldest, found := "", false
		var oldestView *migratedv1.Migration
		for id, t := range migrations {
			view, _ := t.Snapshot()
			if isDone(t) && (!found || view.GetUpdateTime().AsTime().Before(oldestView.GetUpdateTime().AsTime())) {
				oldest, oldestView, found = id, view, true
			}
		}
		if !found {
			break
		}
		over, _ := migrations[oldest].Snapshot() // the last update may have come after the view that was compared
		addTotals(totals, migrations[oldest], over)
		delete(migrations, oldest)
		forgotten = append(forgotten, oldest)
	}
	return forgotten
}
