// SPDX-License-Identifier: Apache-2.0

package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// Migrate moves a VM, and waits until all of its memory is at the destination. Otherwise it returns an error, see Wait.
// A second call with the same id and specification waits for the same migration. seen is called with the
// migration whenever it has changed; seen may be nil.
func (c *Client) Migrate(
	ctx context.Context, id string, spec *migratedv1.MigrationSpec, seen func(*migratedv1.Migration),
) (*migratedv1.Migration, error) {
	answer, err := c.Start(ctx, &migratedv1.StartRequest{Id: id, Spec: spec})
	if err != nil {
		return nil, err
	}
	return c.Wait(ctx, answer.GetMigration().GetId(), seen)
}

// Wait waits until a migration is over, and returns its last version. It keeps waiting while the daemon is started
// again. The error is Outcome's: errors.Is tells whether it is ErrFailed, ErrCancelled or ErrEnded. If ctx ends before,
// the migration continues. Wait then returns the version that it saw last, or nil, and an error.
func (c *Client) Wait(
	ctx context.Context, id string, seen func(*migratedv1.Migration),
) (last *migratedv1.Migration, err error) {
	var pause pauses
	for {
		err := c.watch(ctx, id, func(m *migratedv1.Migration) {
			last = m
			pause.reset()
			if seen != nil {
				seen(m)
			}
		})
		switch {
		case last != nil && Over(last.GetState()):
			return last, Outcome(last)
		case ctx.Err() != nil:
			return last, fmt.Errorf("wait for migration %s: %w", id, context.Cause(ctx))
		case !errors.Is(err, ErrUnreachable):
			return last, err
		}
		if err := pause.wait(ctx); err != nil {
			return last, fmt.Errorf("wait for migration %s: %w", id, err)
		}
	}
}

// watch follows a migration on one stream and calls seen for each version. If the stream ends without an error before
// the migration is over, watch returns ErrUnreachable.
func (c *Client) watch(ctx context.Context, id string, seen func(*migratedv1.Migration)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.Watch(ctx, &migratedv1.WatchRequest{Id: id}, grpc.WaitForReady(true))
	for err == nil {
		var answer *migratedv1.WatchResponse
		if answer, err = stream.Recv(); err == nil {
			seen(answer.GetMigration())
		}
	}
	if errors.Is(err, io.EOF) {
		return c.Explain(status.Error(codes.Unavailable, "the daemon ended the stream before the migration's end"))
	}
	return err
}

// ListAll returns all migrations that match filter, newest first, and the version from which WatchList continues. A nil
// filter matches all.
func (c *Client) ListAll(
	ctx context.Context, filter *migratedv1.MigrationFilter,
) (all []*migratedv1.Migration, resourceVersion string, err error) {
	request := &migratedv1.ListRequest{Filter: filter}
	for {
		page, err := c.List(ctx, request)
		if err != nil {
			return nil, "", err
		}
		all = append(all, page.GetMigrations()...)
		if request.PageToken = page.GetNextPageToken(); request.GetPageToken() == "" {
			return all, page.GetResourceVersion(), nil
		}
	}
}

// The pauses between two attempts to reach a daemon.
const (
	firstPause   = 100 * time.Millisecond
	longestPause = 5 * time.Second
)

// pauses is a backoff: each pause between attempts is twice as long as the one before. The zero value begins with the
// first.
type pauses struct{ next time.Duration }

func (p *pauses) reset() { p.next = 0 }

// wait waits for the next pause. If ctx ends meanwhile, it returns the cause.
func (p *pauses) wait(ctx context.Context) error {
	p.next = min(max(firstPause, 2*p.next), longestPause)
	timer := time.NewTimer(p.next/2 + rand.N(p.next/2)) // jitter: many programs may lose the same daemon at once
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
