// SPDX-License-Identifier: Apache-2.0

package client

import (
	"cmp"
	"context"
	"errors"
	"io"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// silence is how long a daemon may send nothing: it sends a BOOKMARK every ten seconds.
const silence = 35 * time.Second

// Handlers are called when something changes, one at a time. Any may be nil. They must not change their arguments. A
// slow handler delays the others, but loses nothing: later changes come afterwards.
type Handlers struct {
	// Added is called for each migration that is new in the list. At the beginning, these are all.
	Added func(m *migratedv1.Migration)
	// Changed is called for a migration that changed, with the old and the new version.
	Changed func(before, after *migratedv1.Migration)
	// Removed is called, with the last version, for a migration that was deleted or forgotten, or that no longer
	// matches the filter.
	Removed func(m *migratedv1.Migration)
	// Synced is called when the whole list was reported: at the beginning, and whenever the list was read again.
	Synced func()
	// Lost is called when the daemon cannot be followed at the moment. err says why. The Follower tries again.
	Lost func(err error)
}

// key identifies one side of a migration: a host can be both source and destination.
type key struct {
	id   string
	role migratedv1.MigrationRole
}

func keyOf(m *migratedv1.Migration) key { return key{m.GetId(), m.GetRole()} }

// Follower keeps a current list of a host's migrations. It lists them, follows the changes, and lists again when the
// daemon tells it to or was started again.
type Follower struct {
	client   *Client
	filter   *migratedv1.MigrationFilter
	handlers Handlers

	version string // where WatchList continues; if empty, list first

	mu    sync.Mutex
	known map[key]*migratedv1.Migration
}

// NewFollower makes a Follower of the migrations that match filter; nil matches all. It does nothing before Run.
func NewFollower(c *Client, filter *migratedv1.MigrationFilter, h Handlers) *Follower {
	return &Follower{client: c, filter: filter, handlers: h, known: make(map[key]*migratedv1.Migration)}
}

// Migrations returns the migrations that are known now, newest first. The caller must not change them.
func (f *Follower) Migrations() []*migratedv1.Migration {
	f.mu.Lock()
	defer f.mu.Unlock()
	all := make([]*migratedv1.Migration, 0, len(f.known))
	for _, m := range f.known {
		all = append(all, m)
	}
	slices.SortFunc(all, func(a, b *migratedv1.Migration) int {
		return cmp.Or(b.GetCreateTime().AsTime().Compare(a.GetCreateTime().AsTime()), cmp.Compare(a.GetId(), b.GetId()),
			cmp.Compare(a.GetRole(), b.GetRole()))
	})
	return all
}

// Run follows the host until ctx ends, and then returns the cause. It returns an error earlier if it cannot ever
// succeed: the filter is wrong, this caller is not permitted, or the daemon does not have WatchList. Call it only
// once.
func (f *Follower) Run(ctx context.Context) error {
	var pause pauses
	for {
		err := f.once(ctx, &pause)
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(err, ErrListAgain):
			f.version = ""
		case errors.Is(err, ErrUnreachable), errors.Is(err, ErrTooMany), errors.Is(err, errSilent), errors.Is(err, io.EOF):
			if f.handlers.Lost != nil {
				f.handlers.Lost(err)
			}
		default:
			return err
		}
		if err := pause.wait(ctx); err != nil {
			return err
		}
	}
}

// errSilent says that a daemon sent nothing for too long on an open connection.
var errSilent = errors.New("the daemon says nothing")

// once lists, if necessary, and follows one stream to its end.
func (f *Follower) once(ctx context.Context, pause *pauses) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watchdog := time.AfterFunc(silence, func() { cancel(errSilent) })
	defer watchdog.Stop()
	err := f.follow(ctx, func() {
		watchdog.Reset(silence)
		pause.reset()
	})
	if errors.Is(context.Cause(ctx), errSilent) {
		return errSilent
	}
	return err
}

// follow does the work of once. It calls heard whenever the daemon sent something.
func (f *Follower) follow(ctx context.Context, heard func()) error {
	if f.version == "" {
		all, version, err := f.client.ListAll(ctx, f.filter)
		if err != nil {
			return err
		}
		heard()
		f.replace(all)
		f.version = version
	}
	stream, err := f.client.WatchList(ctx, &migratedv1.WatchListRequest{ResourceVersion: f.version, Filter: f.filter})
	if err != nil {
		return err
	}
	for {
		event, err := stream.Recv()
		if err != nil {
			return err
		}
		heard()
		switch event.GetEvent() {
		case migratedv1.ListEvent_LIST_EVENT_ADDED, migratedv1.ListEvent_LIST_EVENT_CHANGED:
			f.put(event.GetMigration())
		case migratedv1.ListEvent_LIST_EVENT_REMOVED:
			f.remove(event.GetMigration())
		}
		f.version = event.GetResourceVersion()
	}
}

// replace replaces the known migrations by all, and calls the handlers for the differences.
func (f *Follower) replace(all []*migratedv1.Migration) {
	there := make(map[key]bool, len(all))
	for _, m := range all {
		there[keyOf(m)] = true
	}
	for _, m := range f.Migrations() {
		if !there[keyOf(m)] {
			f.remove(m)
		}
	}
	for _, m := range slices.Backward(all) {
		f.put(m)
	}
	if f.handlers.Synced != nil {
		f.handlers.Synced()
	}
}

func (f *Follower) put(m *migratedv1.Migration) {
	f.mu.Lock()
	before := f.known[keyOf(m)]
	f.known[keyOf(m)] = m
	f.mu.Unlock()
	switch {
	case before == nil && f.handlers.Added != nil:
		f.handlers.Added(m)
	case before != nil && f.handlers.Changed != nil && !proto.Equal(before, m):
		f.handlers.Changed(before, m)
	}
}

func (f *Follower) remove(m *migratedv1.Migration) {
	f.mu.Lock()
	_, known := f.known[keyOf(m)]
	delete(f.known, keyOf(m))
	f.mu.Unlock()
	if known && f.handlers.Removed != nil {
		f.handlers.Removed(m)
	}
}
