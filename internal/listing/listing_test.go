// SPDX-License-Identifier: Apache-2.0

package listing

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

const (
	setup     = migratedv1.MigrationState_MIGRATION_STATE_SETUP
	active    = migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_ACTIVE
	completed = migratedv1.MigrationState_MIGRATION_STATE_COMPLETED
	added     = migratedv1.ListEvent_LIST_EVENT_ADDED
	changed   = migratedv1.ListEvent_LIST_EVENT_CHANGED
	removed   = migratedv1.ListEvent_LIST_EVENT_REMOVED
)

// A host is a list whose migrations and clock a test changes.
type host struct {
	*List
	time time.Time
	made int // how many migrations were added
}

func newHost() *host {
	h := &host{time: time.Unix(1000, 0)}
	h.List = New(func() time.Time { return h.time })
	return h
}

// kept returns the size of all events in the history.
func (h *host) kept() (bytes int) {
	for element := h.history.Front(); element != nil; element = element.Next() {
		bytes += element.Value.(*Event).size
	}
	return bytes
}

// A vm is a migration of a host.
type vm struct {
	entry *Entry
	is    *migratedv1.Migration // its current state
	newer chan struct{}         // closed, and replaced, by every change
}

// change changes the migration.
func (v *vm) change(how func(*migratedv1.Migration)) {
	how(v.is)
	close(v.newer)
	v.newer = make(chan struct{})
}

func (v *vm) to(state migratedv1.MigrationState) {
	v.change(func(m *migratedv1.Migration) { m.State = state })
}

func (h *host) add(role migratedv1.MigrationRole, labels map[string]string) *vm {
	h.made++
	v := &vm{newer: make(chan struct{}), is: &migratedv1.Migration{
		Id: fmt.Sprint("m", h.made), Role: role, State: setup, CreateTime: timestamppb.New(h.time),
		Spec: &migratedv1.MigrationSpec{Labels: labels}, Progress: &migratedv1.Progress{},
	}}
	v.entry = h.Add(func() (*migratedv1.Migration, <-chan struct{}) { return proto.CloneOf(v.is), v.newer })
	return v
}

// moves changes only figures.
func (v *vm) moves() { v.change(func(m *migratedv1.Migration) { m.Progress.PagesPresent++ }) }

// passes advances the clock.
func (h *host) passes(d time.Duration) { h.time = h.time.Add(d) }

// A watcher keeps a copy of the list, which it updates by events.
type watcher struct {
	want    Filter
	version uint64
	has     map[string]*migratedv1.Migration
	states  []string // the changes of state in the events that it received
}

func key(m *migratedv1.Migration) string { return m.GetRole().String() + m.GetId() }

func (h *host) watch(want Filter) *watcher {
	w := &watcher{want: want, has: make(map[string]*migratedv1.Migration)}
	views, version := h.All(want)
	for _, m := range views {
		w.has[key(m)] = m
	}
	w.version = version
	return w
}

// catchUp applies all events since the last call. It fails if a migration is added twice, or changed or removed before
// it was added.
func (w *watcher) catchUp(h *host) error {
	events, _, err := h.After(w.version)
	if err != nil {
		return err
	}
	for _, e := range events {
		if e.Version <= w.version {
			return fmt.Errorf("version %d comes after %d", e.Version, w.version)
		}
		w.version = e.Version
		what := w.want.Event(e)
		before, known := w.has[key(e.View)]
		switch {
		case what == 0:
			continue
		case what == added && known, what != added && !known:
			return fmt.Errorf("%v of %s, which it knows: %t", what, key(e.View), known)
		case what == removed:
			delete(w.has, key(e.View))
		default:
			w.has[key(e.View)] = e.View
		}
		if what != changed || before.GetState() != e.View.GetState() {
			w.states = append(w.states, fmt.Sprint(e.Version, what, key(e.View), e.View.GetState()))
		}
	}
	return nil
}

// is compares the watcher's copy with the list.
func (w *watcher) is(h *host) error {
	fresh := h.watch(w.want)
	if len(fresh.has) != len(w.has) {
		return fmt.Errorf("it has %d migrations, the list %d", len(w.has), len(fresh.has))
	}
	for k, m := range fresh.has {
		if !proto.Equal(m, w.has[k]) {
			return fmt.Errorf("it has %v, the list has %v", w.has[k], m)
		}
	}
	return nil
}

// TestWatchersHaveTheList: after any sequence of changes, a watcher's copy equals the list, and a watcher that is too
// slow receives ErrListAgain.
func TestWatchersHaveTheList(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		h := newHost()
		h.mostEvents = rapid.SampledFrom([]int{3, 20, mostEvents}).Draw(t, "events kept")
		var vms []*vm
		var watchers []*watcher
		all := h.watch(Filter{}) // is never slow
		pick := func(t *rapid.T) *vm {
			if len(vms) == 0 {
				t.Skip("none is there")
			}
			return rapid.SampledFrom(vms).Draw(t, "migration")
		}
		filter := rapid.Custom(func(t *rapid.T) Filter {
			return Filter{
				labels:   rapid.SampledFrom([]map[string]string{nil, {"a": "1"}, {"a": "1", "b": "2"}}).Draw(t, "labels"),
				role:     rapid.SampledFrom([]migratedv1.MigrationRole{0, 1, 2}).Draw(t, "role"),
				underWay: rapid.Bool().Draw(t, "under way"),
			}
		})
		catchUp := func(t *rapid.T, w *watcher) {
			lost := w.version < h.lost
			err := w.catchUp(h)
			if lost != errors.Is(err, ErrListAgain) || !lost && err != nil {
				t.Fatalf("from %d, of which everything after %d is kept: %v", w.version, h.lost, err)
			}
			if lost {
				*w = *h.watch(w.want)
			}
		}
		t.Repeat(map[string]func(*rapid.T){
			"add": func(t *rapid.T) {
				labels := rapid.SampledFrom([]map[string]string{
					nil, {"a": "1"}, {"a": "1", "b": "2"}, {"a": "2"},
				}).Draw(t, "labels")
				vms = append(vms, h.add(rapid.SampledFrom([]migratedv1.MigrationRole{1, 2}).Draw(t, "role"), labels))
			},
			"state": func(t *rapid.T) {
				v := pick(t)
				v.to(rapid.SampledFrom([]migratedv1.MigrationState{setup, active, completed}).Draw(t, "state"))
				v.entry.Refresh()
			},
			"figures": func(t *rapid.T) {
				v := pick(t)
				v.moves()
				v.entry.Refresh()
			},
			"time": func(t *rapid.T) { h.passes(time.Duration(rapid.IntRange(1, 150).Draw(t, "ms")) * time.Millisecond) },
			"remove": func(t *rapid.T) {
				v := pick(t)
				v.entry.Remove()
				v.entry.Remove() // once is enough
				v.change(func(m *migratedv1.Migration) { m.Prepared = !m.GetPrepared() })
				v.entry.Refresh() // comes too late
				for i := range vms {
					if vms[i] == v {
						vms = append(vms[:i:i], vms[i+1:]...)
						break
					}
				}
			},
			"watch": func(t *rapid.T) { watchers = append(watchers, h.watch(filter.Draw(t, "filter"))) },
			"catch up": func(t *rapid.T) {
				if len(watchers) == 0 {
					t.Skip("none is there")
				}
				catchUp(t, rapid.SampledFrom(watchers).Draw(t, "watcher"))
			},
			"": func(t *rapid.T) {
				if kept := h.kept(); h.history.Len() > h.mostEvents || kept != h.bytes {
					t.Fatalf("%d events are kept, of %d bytes, and %d were counted", h.history.Len(), kept, h.bytes)
				}
				catchUp(t, all)
			},
		})
		h.passes(time.Second)
		h.All(Filter{}) // publishes figures
		for i, w := range append(watchers, all) {
			catchUp(t, w)
			if err := w.is(h); err != nil {
				t.Fatalf("watcher %d of %+v: %v", i, w.want, err)
			}
		}
	})
}

// TestEveryStateIsToldOf: a slow watcher receives every event but figures that were replaced.
func TestEveryStateIsToldOf(t *testing.T) {
	h := newHost()
	slow, quick := h.watch(Filter{}), h.watch(Filter{})
	v := h.add(1, nil)
	for _, state := range []migratedv1.MigrationState{active, completed} {
		for range 5 {
			v.moves()
			h.passes(figuresEvery)
			v.entry.Refresh()
			if err := quick.catchUp(h); err != nil {
				t.Fatal(err)
			}
		}
		v.to(state)
		v.entry.Refresh()
	}
	v.entry.Remove()
	if err := errors.Join(slow.catchUp(h), quick.catchUp(h)); err != nil {
		t.Fatal(err)
	}
	if len(slow.states) != 4 || strings.Join(slow.states, ";") != strings.Join(quick.states, ";") {
		t.Errorf("who was slow was told of\n%q, who was quick of\n%q", slow.states, quick.states)
	}
	if n := h.history.Len(); n != 1+2+2+1 {
		t.Errorf("%d events are kept", n)
	}
}

// TestFiguresAreCoalesced: changes of figures are published at most ten times a second, other changes at once.
func TestFiguresAreCoalesced(t *testing.T) {
	h := newHost()
	v := h.add(1, nil)
	version := func() uint64 { _, n := h.All(Filter{}); return n }
	v.moves()
	if _, wait := v.entry.Refresh(); wait != figuresEvery || version() != 1 {
		t.Errorf("figures have to wait %v, version %d", wait, version())
	}
	h.passes(figuresEvery / 4)
	if _, wait := v.entry.Refresh(); wait != figuresEvery*3/4 {
		t.Errorf("a moment later they have to wait %v", wait)
	}
	v.change(func(m *migratedv1.Migration) { m.Prepared = true })
	if _, wait := v.entry.Refresh(); wait != 0 || version() != 2 {
		t.Errorf("what is no figure has to wait %v, version %d", wait, version())
	}
	if _, wait := v.entry.Refresh(); wait != 0 || version() != 2 {
		t.Errorf("what has not changed has to wait %v, version %d", wait, version())
	}
}

// TestHistoryIsBounded: the history has at most mostBytes bytes.
func TestHistoryIsBounded(t *testing.T) {
	h := newHost()
	h.mostBytes = 10_000
	long := map[string]string{"a": strings.Repeat("x", 256)}
	for range 1000 {
		h.add(1, long)
	}
	if sum := h.kept(); sum != h.bytes || sum > h.mostBytes || sum < h.mostBytes/2 {
		t.Errorf("%d bytes are kept, %d were counted, %d may be", sum, h.bytes, h.mostBytes)
	}
	if _, _, err := h.After(h.lost - 1); !errors.Is(err, ErrListAgain) {
		t.Errorf("what is not kept any more: %v", err)
	}
	if events, _, err := h.After(h.lost); err != nil || len(events) != h.history.Len() {
		t.Errorf("what is kept: %d events, %v", len(events), err)
	}
}

func TestBadVersionsAndPages(t *testing.T) {
	h, other := newHost(), newHost()
	h.add(1, nil)
	other.add(1, nil)
	h.passes(time.Second)
	other.passes(time.Second)
	h.add(1, nil)
	other.add(1, nil)
	page, err := other.Page(Filter{}, 1, "")
	if err != nil || page.GetNextPageToken() == "" {
		t.Fatal(page, err)
	}
	if _, err := h.Page(Filter{}, 1, page.GetNextPageToken()); !errors.Is(err, ErrListAgain) {
		t.Errorf("a page of another run: %v", err)
	}
	if _, err := h.Parse(page.GetResourceVersion()); !errors.Is(err, ErrListAgain) {
		t.Errorf("a version of another run: %v", err)
	}
	if _, _, err := h.After(3); !errors.Is(err, ErrListAgain) {
		t.Errorf("a version that was not given yet: %v", err)
	}
	for _, bad := range []string{"x", "-", "-3", h.run + "-", h.run + "--1", h.run + "-1.5"} {
		if _, err := h.Parse(bad); err == nil || errors.Is(err, ErrListAgain) {
			t.Errorf("%q is taken for a version: %v", bad, err)
		}
	}
	for _, bad := range []string{"x", "!", strings.Repeat("A", 2000), "e30"} {
		if _, err := h.Page(Filter{}, 1, bad); err == nil || errors.Is(err, ErrListAgain) {
			t.Errorf("%.10q is taken for a page: %v", bad, err)
		}
	}
	if _, err := h.Page(Filter{}, MostOfPage+1, ""); err == nil {
		t.Error("a page of more than may be")
	}
}
