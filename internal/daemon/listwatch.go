// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/internal/limits"
	"github.com/migrated-vm/migrated/internal/listing"
	"github.com/migrated-vm/migrated/internal/migration"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// bookmarkEvery is how often a watcher of the list receives a bookmark, its current version.
const bookmarkEvery = 10 * time.Second

// show adds a migration to the list, and starts to publish its changes. The caller holds mu.
func (r *registry) show(t tracked) {
	e := r.shown.Add(t.Snapshot)
	r.entries[t] = e
	go r.publish(e)
}

// publish publishes each change of a migration in the list, until the migration is removed or the list closed.
func (r *registry) publish(e *listing.Entry) {
	for {
		changed, wait := e.Refresh()
		var again <-chan time.Time
		if wait > 0 {
			again = time.After(wait)
		}
		select {
		case <-e.Gone():
			return
		case <-r.shown.Closed():
			return
		case <-changed:
		case <-again:
		}
	}
}

// drop removes a migration from the list, and adds its counts to those of the forgotten. The caller holds mu.
func (r *registry) drop(t tracked) {
	view, _ := t.Snapshot()
	addTotals(&r.forgotten, t, view)
	r.entries[t].Remove()
	delete(r.entries, t)
}

// delete deletes the sides of a migration that are on this host. found is false if there is none.
func (r *registry) delete(ctx context.Context, id string) (found bool, err error) {
	r.mu.Lock()
	var sides []tracked
	if s := r.sources[id]; s != nil {
		sides = append(sides, s)
	}
	if d := r.destinations[id]; d != nil {
		sides = append(sides, d)
	}
	if l := r.leftovers[id]; l != nil {
		sides = append(sides, l)
	}
	r.mu.Unlock()
	for _, t := range sides {
		if err := t.Delete(ctx); err != nil { // without mu, because it may ask another host
			return true, err
		}
		r.forget(id, t)
	}
	return len(sides) > 0, nil
}

// forget removes one side of a migration from the registry, if it is still there.
func (r *registry) forget(id string, t tracked) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.entries[t] == nil {
		return
	}
	r.drop(t)
	if s, is := t.(*migration.Source); is && r.sources[id] == s {
		delete(r.sources, id)
	}
	if d, is := t.(*migration.Destination); is && r.destinations[id] == d {
		delete(r.destinations, id)
		delete(r.senders, id)
	}
}

func (c *controlService) Delete(
	ctx context.Context, request *migratedv1.DeleteRequest,
) (*migratedv1.DeleteResponse, error) {
	id := request.GetId()
	if evacuation := c.daemon.evacuations.Follows(id); evacuation != "" {
		return nil, migration.ToStatus(codes.FailedPrecondition, migration.WithRemedy(
			fmt.Errorf("evacuation %s has not heard yet how the migration ended", evacuation), "try again in a moment"))
	}
	found, err := c.daemon.migrations.delete(ctx, id)
	if err != nil {
		return nil, migration.ToStatus(codes.FailedPrecondition, err)
	}
	if !found && (!validID.MatchString(id) || !c.daemon.reports.Has(id, migratedv1.MigrationRole_MIGRATION_ROLE_SOURCE) &&
		!c.daemon.reports.Has(id, migratedv1.MigrationRole_MIGRATION_ROLE_DESTINATION)) {
		return nil, notFound(id)
	}
	c.daemon.deleting.Lock()
	defer c.daemon.deleting.Unlock()
	if err := c.daemon.reports.Delete(id); err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	return &migratedv1.DeleteResponse{}, nil
}

func (c *controlService) List(_ context.Context, request *migratedv1.ListRequest) (*migratedv1.ListResponse, error) {
	want, err := listing.NewFilter(request.GetFilter())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	page, err := c.daemon.migrations.shown.Page(want, request.GetPageSize(), request.GetPageToken())
	if err != nil {
		return nil, listError(err)
	}
	return page, nil
}

// listError returns the gRPC status of an error about a version or a page token.
func listError(err error) error {
	if errors.Is(err, listing.ErrListAgain) {
		return migration.ToStatus(codes.OutOfRange, migration.ListAgain(err))
	}
	return status.Error(codes.InvalidArgument, err.Error())
}

func (c *controlService) WatchList(
	request *migratedv1.WatchListRequest, stream grpc.ServerStreamingServer[migratedv1.WatchListResponse],
) error {
	want, err := listing.NewFilter(request.GetFilter())
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	caller := callerID(stream.Context())
	leave, err := c.daemon.watchers.Take(caller)
	if err != nil {
		c.daemon.refusals.Refused(limits.Watching, callerNetwork(stream.Context()))
		return status.Error(codes.ResourceExhausted, err.Error())
	}
	defer leave()
	w := &listWatcher{list: c.daemon.migrations.shown, want: want, send: stream.Send}
	if request.GetResourceVersion() == "" {
		err = w.begin()
	} else if w.version, err = w.list.Parse(request.GetResourceVersion()); err != nil {
		err = listError(err)
	}
	if err != nil {
		return err
	}
	return w.follow(stream.Context(), c.daemon.stopping, bookmarkEvery)
}

// A listWatcher sends the events of a list after version. It has no queue: it reads events that it has not sent
// from the list's history, and ends with ErrListAgain if they are not there any more.
type listWatcher struct {
	list    *listing.List
	want    listing.Filter
	version uint64
	send    func(*migratedv1.WatchListResponse) error
}

// begin sends all migrations, and a bookmark.
func (w *listWatcher) begin() error {
	views, version := w.list.All(w.want)
	w.version = version
	for _, view := range views {
		err := w.send(&migratedv1.WatchListResponse{Event: migratedv1.ListEvent_LIST_EVENT_ADDED, Migration: view})
		if err != nil {
			return err
		}
	}
	return w.bookmark()
}

// bookmark sends the watcher's version.
func (w *listWatcher) bookmark() error {
	return w.send(&migratedv1.WatchListResponse{
		Event: migratedv1.ListEvent_LIST_EVENT_BOOKMARK, ResourceVersion: w.list.Text(w.version),
	})
}

// follow sends events until ctx ends or the daemon stops.
func (w *listWatcher) follow(ctx context.Context, stopping <-chan struct{}, bookmarks time.Duration) error {
	ticker := time.NewTicker(bookmarks)
	defer ticker.Stop()
	for last := false; ; {
		more, err := w.catchUp()
		if err != nil {
			return err
		}
		if last {
			return status.Error(codes.Unavailable,
				"the daemon ends, and goes on with its migrations when it is started again: list again then")
		}
		select {
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		case <-stopping:
			w.list.All(w.want) // publishes the last states of the migrations
			last = true
		case <-ticker.C:
			if err := w.bookmark(); err != nil {
				return err
			}
		case <-more:
		}
	}
}

// catchUp sends all events after the watcher's version, and returns a channel that is closed with the next event.
func (w *listWatcher) catchUp() (more <-chan struct{}, err error) {
	events, more, err := w.list.After(w.version)
	if err != nil {
		return nil, listError(err)
	}
	for _, e := range events {
		w.version = e.Version
		what := w.want.Event(e)
		if what == migratedv1.ListEvent_LIST_EVENT_UNSPECIFIED {
			continue
		}
		err := w.send(&migratedv1.WatchListResponse{
			Event: what, Migration: e.View, ResourceVersion: w.list.Text(e.Version),
		})
		if err != nil {
			return nil, err
		}
	}
	return more, nil
}
