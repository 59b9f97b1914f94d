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

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// A display shows a migration that is being followed.
type display interface {
	// show is given the migration each time the daemon sent it.
	show(m *migratedv1.Migration)
	// close ends the display; what show was given last stays visible.
	close()
}

// display chooses how to show a migration: as JSON if asked for, as a bar on a
// terminal, as lines anywhere else. interval is the least time between two
// lines of the same state; a terminal is redrawn as the daemon sends.
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

// maxReconnects bounds how often one command connects again: a daemon that is
// restarted needs one, one that breaks every stream is broken.
const maxReconnects = 30

// watchInterval is how often the daemon is asked to send; a display that wants
// fewer leaves some out, so that it still sees each state.
const watchInterval = 100 * time.Millisecond

// follow shows a migration until done says so or it has ended, and returns how
// it stood then. It survives a daemon's restart.
func (c *client) follow(id string, d display, done func(*migratedv1.Migration) bool) (last *migratedv1.Migration, err error) {
	defer d.close()
	for range 1 + maxReconnects {
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
				remedy: fmt.Sprintf("\"migrated watch %s\" follows it again, \"migrated cancel %s\" ends it if the VM has not switched over", id, id)}
		case last == nil || status.Code(err) != codes.Unavailable:
			return last, c.lost(id, last, err)
		}
	}
	return last, c.lost(id, last, err)
}

// lost explains an error in the middle of a migration, which the daemons go on
// with whether or not somebody watches.
func (c *client) lost(id string, last *migratedv1.Migration, err error) error {
	err = c.explain(id, err)
	var f *failure
	if last != nil && errors.As(err, &f) && f.exit == exitUnreachable {
		f.message = fmt.Sprintf("lost sight of migration %s: %s", id, f.message)
		f.vm = fmt.Sprintf("when last seen (%s), %s", timeText(last.GetUpdateTime()), stateMeaning(last))
	}
	return err
}

// watchOnce follows a migration over one stream. It returns a nil error where
// there is no more to see, and the last message in any case. Where again is
// set it waits for a daemon that is not there yet.
func (c *client) watchOnce(id string, d display, done func(*migratedv1.Migration) bool, again bool) (last *migratedv1.Migration, err error) {
	ctx, cancel := context.WithCancel(c.app.ctx)
	defer cancel()
	// The timeout is for the first answer alone.
	unanswered := time.AfterFunc(c.app.timeout, cancel)
	defer unanswered.Stop()
	stream, err := c.Watch(ctx, &migratedv1.WatchRequest{Id: id, Interval: durationpb.New(watchInterval)}, grpc.WaitForReady(again))
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
		if isTerminal(last.GetState()) || done(last) {
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

// toTheEnd is follow's done for a migration that is waited for.
func toTheEnd(*migratedv1.Migration) bool { return false }

// outcome returns the failure that a migration's end means, nil for success.
func outcome(m *migratedv1.Migration) error {
	switch m.GetState() {
	case migratedv1.MigrationState_MIGRATION_STATE_FAILED:
		e := m.GetError()
		return &failure{exit: exitFailed, message: fmt.Sprintf("migration %s failed: %s", m.GetId(), e.GetMessage()),
			vm: e.GetVmStatus(), remedy: e.GetRemedy()}
	case migratedv1.MigrationState_MIGRATION_STATE_CANCELLED:
		return &failure{exit: exitCancelled, message: fmt.Sprintf("migration %s was cancelled", m.GetId()),
			vm: orText(m.GetError().GetVmStatus(), locationText(m))}
	case migratedv1.MigrationState_MIGRATION_STATE_ENDED:
		return &failure{exit: exitEnded, message: fmt.Sprintf("migration %s is over: %s", m.GetId(), m.GetError().GetMessage()),
			vm: m.GetError().GetVmStatus(), remedy: m.GetError().GetRemedy()}
	default:
		return nil
	}
}
