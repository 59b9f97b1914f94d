// SPDX-License-Identifier: Apache-2.0

// Package listing keeps the list of a host's migrations, and a history of its changes:
//
//	migration ──► Entry.Refresh ──► List: each entry as it was last published
//	                                 │    and the history of published events
//	                                 ├──► Page     (List)
//	                                 └──► After    (WatchList), for each watcher from its own version
//
// Each published event has a version, which only List.publish assigns. A client that has a page and asks for the events
// after its version sees every change since, in order. Only figures are left out that newer figures of the same
// migration have replaced. The history is bounded, and watchers have no queues: a watcher that asks for events that are
// not in the history any more is told to list again.
//
// A List and a migration never wait for each other: Refresh copies the state of a migration under the lock of that
// migration, and nobody calls a List while holding such a lock.
package listing

import (
	"cmp"
	"container/list"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/migrated-vm/migrated/internal/migration"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

const (
	// mostEvents and mostBytes bound the history. A migration without failures leaves a dozen events in it.
	mostEvents = 4096
	mostBytes  = 8 << 20
	// figuresEvery is the shortest time between two events of a migration if only its figures have changed.
	figuresEvery = 100 * time.Millisecond
)

// ErrListAgain says that a version is too old, or is from another run of the daemon.
var ErrListAgain = errors.New("the list has to be read again")

// A List may be used by several goroutines at once. The migrations that it returns are shared: callers must not change
// them.
type List struct {
	run        string // identifies this run of the daemon in versions
	now        func() time.Time
	mostEvents int
	mostBytes  int

	mu      sync.Mutex
	entries map[*Entry]struct{}
	version uint64
	changed chan struct{} // closed, and replaced, with every event
	history *list.List    // of *Event, the oldest first
	bytes   int           // size of the history
	lost    uint64        // version of the newest event that was dropped because the history was full
	closed  chan struct{}
}

// An Entry is one migration in a List.
type Entry struct {
	list     *List
	snapshot func() (*migratedv1.Migration, <-chan struct{})
	gone     chan struct{} // closed when the entry is removed

	// Guarded by list.mu.
	removed   bool
	newer     <-chan struct{}       // closed when the migration has changed since view; nil: it may have changed
	view      *migratedv1.Migration // as it was last published
	published time.Time             // when that was
	figures   *list.Element         // the last event, if only figures had changed
}

// An Event is a published change.
type Event struct {
	Version uint64
	What    migratedv1.ListEvent
	View    *migratedv1.Migration
	wasOver bool // whether the migration was over before the event
	entry   *Entry
	size    int
}

// New returns an empty list. now is the clock, which must be monotonic.
func New(now func() time.Time) *List {
	return &List{
		run: strings.ToLower(rand.Text()[:8]), now: now, mostEvents: mostEvents, mostBytes: mostBytes,
		entries: make(map[*Entry]struct{}), changed: make(chan struct{}), history: list.New(), closed: make(chan struct{}),
	}
}

// Close closes the channel Closed. It may be called repeatedly.
func (l *List) Close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-l.closed:
	default:
		close(l.closed)
	}
}

// Closed is closed by Close.
func (l *List) Closed() <-chan struct{} { return l.closed }

// Add adds a migration and publishes it. snapshot returns a copy of its current state, which the List owns from then
// on, and a channel that is closed when that changes. Its id, role and labels must never change.
func (l *List) Add(snapshot func() (*migratedv1.Migration, <-chan struct{})) *Entry {
	e := &Entry{list: l, snapshot: snapshot, gone: make(chan struct{})}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.entries[e] = struct{}{}
	view, newer := snapshot()
	l.publish(e, migratedv1.ListEvent_LIST_EVENT_ADDED, view, isOver(view))
	e.newer = newer
	return e
}

// Gone is closed when the entry is removed.
func (e *Entry) Gone() <-chan struct{} { return e.gone }

// Remove publishes the last state of the migration, and removes it. It may be called repeatedly.
func (e *Entry) Remove() {
	l := e.list
	l.mu.Lock()
	defer l.mu.Unlock()
	if e.removed {
		return
	}
	l.refresh(e)
	delete(l.entries, e)
	e.removed = true
	l.publish(e, migratedv1.ListEvent_LIST_EVENT_REMOVED, e.view, isOver(e.view))
	close(e.gone)
}

// Refresh publishes the state of the migration if it has changed, and returns a channel that is closed when it changes
// again. If only figures have changed and less than figuresEvery has passed since the last event, it publishes nothing
// and returns in wait how long the caller should wait before it calls Refresh again; otherwise wait is 0.
func (e *Entry) Refresh() (more <-chan struct{}, wait time.Duration) {
	e.list.mu.Lock()
	defer e.list.mu.Unlock()
	return e.list.refresh(e)
}

// refresh is Refresh for callers that hold mu. With two at once, the later state could be published first.
func (l *List) refresh(e *Entry) (more <-chan struct{}, wait time.Duration) {
	if e.removed {
		return nil, 0
	}
	if e.newer != nil {
		select {
		case <-e.newer:
		default:
			return e.newer, 0
		}
	}
	view, newer := e.snapshot()
	e.newer = nil
	if proto.Equal(view, e.view) {
		e.newer = newer
		return newer, 0
	}
	figures := onlyFigures(e.view, view)
	if passed := l.now().Sub(e.published); figures && passed < figuresEvery {
		return newer, figuresEvery - passed
	}
	if figures && e.figures != nil { // the new event replaces the last one
		l.drop(e.figures)
	}
	l.publish(e, migratedv1.ListEvent_LIST_EVENT_CHANGED, view, isOver(e.view))
	if figures {
		e.figures = l.history.Back()
	}
	e.newer = newer
	return newer, 0
}

// publish adds an event with the next version to the history. The caller holds mu.
func (l *List) publish(e *Entry, what migratedv1.ListEvent, view *migratedv1.Migration, wasOver bool) {
	l.version++
	event := &Event{Version: l.version, What: what, View: view, wasOver: wasOver, entry: e, size: proto.Size(view)}
	e.view, e.published, e.figures = view, l.now(), nil
	l.history.PushBack(event)
	l.bytes += event.size
	for l.history.Len() > l.mostEvents || l.bytes > l.mostBytes && l.history.Len() > 1 {
		l.lost = l.history.Front().Value.(*Event).Version
		l.drop(l.history.Front())
	}
	close(l.changed)
	l.changed = make(chan struct{})
}

// drop removes an event from the history. The caller holds mu.
func (l *List) drop(element *list.Element) {
	event := l.history.Remove(element).(*Event)
	l.bytes -= event.size
	if event.entry.figures == element {
		event.entry.figures = nil
	}
}

// After returns the events after a version, the oldest first, and a channel that is closed with the next event. The
// error is ErrListAgain.
func (l *List) After(version uint64) (events []*Event, more <-chan struct{}, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if version < l.lost || version > l.version {
		return nil, nil, ErrListAgain
	}
	for element := l.history.Back(); element != nil; element = element.Prev() {
		event := element.Value.(*Event)
		if event.Version <= version {
			break
		}
		events = append(events, event)
	}
	slices.Reverse(events)
	return events, l.changed, nil
}

// All returns the current states of the migrations that a filter selects, newest first, and the version of the list.
func (l *List) All(want Filter) (views []*migratedv1.Migration, version uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for e := range l.entries {
		l.refresh(e)
		if want.Matches(e.view) {
			views = append(views, e.view)
		}
	}
	slices.SortFunc(views, newestFirst)
	return views, l.version
}

// newestFirst is the order of pages. It compares only what never changes in a migration.
func newestFirst(a, b *migratedv1.Migration) int {
	return cmp.Or(
		b.GetCreateTime().AsTime().Compare(a.GetCreateTime().AsTime()),
		cmp.Compare(a.GetId(), b.GetId()), cmp.Compare(a.GetRole(), b.GetRole()))
}

// Text returns the API's form of a version.
func (l *List) Text(version uint64) string { return l.run + "-" + strconv.FormatUint(version, 10) }

// Parse reads a version in the API's form. The error is ErrListAgain if it is from another run of the daemon, and
// another error if it is no version.
func (l *List) Parse(text string) (version uint64, err error) {
	run, number, ok := strings.Cut(text, "-")
	version, err = strconv.ParseUint(number, 10, 64)
	switch {
	case !ok || err != nil || run == "":
		return 0, fmt.Errorf("%q is no resource version", text)
	case run != l.run:
		return 0, ErrListAgain
	}
	return version, nil
}

func isOver(view *migratedv1.Migration) bool { return migration.Terminal(view.GetState()) }

// onlyFigures says whether two states of one migration differ only in figures. It changes after for the duration
// of the call.
func onlyFigures(before, after *migratedv1.Migration) bool {
	progress, updated := after.GetProgress(), after.GetUpdateTime()
	after.Progress, after.UpdateTime = before.GetProgress(), before.GetUpdateTime()
	same := proto.Equal(before, after)
	after.Progress, after.UpdateTime = progress, updated
	return same
}
