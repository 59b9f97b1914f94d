// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/migrated-vm/migrated/internal/migration"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// A display shows a migration that is being followed.
type display interface {
	// show is called each time the daemon has sent the migration.
	show(m *migratedv1.Migration)
	// close ends the display. The last state stays visible.
	close()
}

// display returns the display for a migration: JSON with --json, a bar on a
// terminal, and otherwise lines. interval is the shortest time between two lines
// of the same state; a terminal is redrawn with each message of the daemon.
func (a *app) display(interval time.Duration) display {
	switch {
	case a.json:
		return &throttled{interval: interval, print: a.printMessage}
	case isTerminalFile(a.stdout):
		return newBar(a.stdout)
	default:
		return &throttled{interval: interval, print: func(m *migratedv1.Migration) { a.printf("%s\n", plainLine(m)) }}
	}
}

// maxReconnects is how often one command connects again. A restart of the daemon
// needs a few; a daemon that ends every stream is broken.
const maxReconnects = 30

// The pauses between two attempts to connect again.
const (
	firstPause   = 100 * time.Millisecond
	longestPause = 2 * time.Second
)

// pauseBefore waits before attempt n to follow something: a daemon that ends answers until its server has stopped.
// There is no pause before the first attempt, n == 0.
func (a *app) pauseBefore(n int) {
	if n == 0 {
		return
	}
	select {
	case <-time.After(min(firstPause<<(n-1), longestPause)):
	case <-a.ctx.Done():
	}
}

// watchInterval is the interval at which the daemon is asked to send. A display
// that shows less leaves messages out, so that it still sees each state.
const watchInterval = 100 * time.Millisecond

// follow shows a migration until it is over or done returns true, and returns its
// last state. It goes on if the daemon restarts meanwhile.
func (c *daemonClient) follow(
	id string, d display, done func(*migratedv1.Migration) bool,
) (last *migratedv1.Migration, err error) {
	defer d.close()
	for n := range 1 + maxReconnects {
		c.app.pauseBefore(n)
		var seen *migratedv1.Migration
		seen, err = c.watchOnce(id, d, done, last != nil)
		if seen != nil {
			last = seen
		}
		switch {
		case err == nil:
			return last, nil
		case c.app.ctx.Err() != nil:
			return last, &failure{exit: exitInterrupted, message: fmt.Sprintf("stopped watching; migration %s goes on", id),
				remedy: fmt.Sprintf("\"migrated watch %s\" follows it again, "+
					"\"migrated cancel %s\" ends it if the VM has not switched over", id, id)}
		case last == nil || status.Code(err) != codes.Unavailable:
			return last, c.lost(id, last, err)
		}
	}
	return last, c.lost(id, last, err)
}

// lost explains an error while a migration is followed. The migration itself goes
// on, whether or not it is followed.
func (c *daemonClient) lost(id string, last *migratedv1.Migration, err error) error {
	err = c.explain(id, err)
	var f *failure
	if last != nil && errors.As(err, &f) && f.exit == exitUnreachable {
		f.message = fmt.Sprintf("lost sight of migration %s: %s", id, f.message)
		f.vm = fmt.Sprintf("when last seen (%s), %s", timeText(last.GetUpdateTime()), stateMeaning(last))
	}
	return err
}

// watchOnce follows a migration over one stream. It returns nil if the migration
// is over or done returned true, and the last message in any case. With again, it
// waits for a daemon that cannot be reached.
func (c *daemonClient) watchOnce(
	id string, d display, done func(*migratedv1.Migration) bool, again bool,
) (last *migratedv1.Migration, err error) {
	ctx, cancel := context.WithCancel(c.app.ctx)
	defer cancel()
	// The timeout is only for the first answer.
	unanswered := time.AfterFunc(c.app.timeout, cancel)
	defer unanswered.Stop()
	stream, err := c.Watch(ctx, &migratedv1.WatchRequest{Id: id, Interval: durationpb.New(watchInterval)},
		grpc.WaitForReady(again))
	for err == nil {
		var answer *migratedv1.WatchResponse
		if answer, err = stream.Recv(); err != nil {
			break
		}
		if last == nil && !unanswered.Stop() {
			break // too late: ctx has ended
		}
		last = answer.GetMigration()
		d.show(last)
		if migration.Terminal(last.GetState()) || done(last) {
			return last, nil
		}
	}
	switch {
	case errors.Is(err, io.EOF):
		return last, status.Error(codes.Unavailable, "it ended the stream before the migration's end")
	case last == nil && ctx.Err() != nil && c.app.ctx.Err() == nil:
		return nil, status.Error(codes.DeadlineExceeded, "no answer")
	}
	return last, err
}

// toTheEnd is a done for follow that waits for the end of the migration.
func toTheEnd(*migratedv1.Migration) bool { return false }

// outcome returns the failure of a migration that is over; nil: it has succeeded.
func outcome(m *migratedv1.Migration) error {
	switch m.GetState() {
	case migratedv1.MigrationState_MIGRATION_STATE_FAILED:
		e := m.GetError()
		return &failure{exit: exitFailed, message: fmt.Sprintf("migration %s failed: %s", m.GetId(), e.GetMessage()),
			vm: e.GetVmStatus(), remedy: e.GetRemedy()}
	case migratedv1.MigrationState_MIGRATION_STATE_CANCELLED:
		return &failure{exit: exitCancelled, message: fmt.Sprintf("migration %s was cancelled", m.GetId()),
			vm: orText(m.GetError().GetVmStatus(), migration.LocationText(m))}
	case migratedv1.MigrationState_MIGRATION_STATE_ENDED:
		return &failure{exit: exitEnded,
			message: fmt.Sprintf("migration %s is over: %s", m.GetId(), m.GetError().GetMessage()),
			vm:      m.GetError().GetVmStatus(),
			remedy:  m.GetError().GetRemedy() + prefixed("; the domain's definition ", m.GetDefinition())}
	case migratedv1.MigrationState_MIGRATION_STATE_COMPLETED:
		if e := m.GetError(); e.GetReason() == migratedv1.Reason_REASON_INTERFERED { // the VM runs on both hosts
			return &failure{exit: exitFailed, message: fmt.Sprintf("migration %s completed, but %s", m.GetId(), e.GetMessage()),
				vm: e.GetVmStatus(), remedy: e.GetRemedy()}
		}
	}
	return nil
}
