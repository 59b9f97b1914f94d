// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/internal/limits"
	"github.com/migrated-vm/migrated/internal/migration"
	"github.com/migrated-vm/migrated/internal/turns"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// takeTurn says whether a migration away from this host may begin, because fewer than most are under way. One that
// waits for its other host does not count: it moves nothing, and may wait for days.
func (r *registry) takeTurn(id string, most int) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	count := 0
	for other := range r.turn {
		s := r.sources[other]
		switch {
		case s == nil || isDone(s):
			delete(r.turn, other)
		case !isStuck(s):
			count++
		}
	}
	if count >= most {
		return false
	}
	r.turn[id] = true
	return true
}

// isStuck says whether a migration waits for its other host.
func isStuck(s *migration.Source) bool {
	view, _ := s.Snapshot()
	switch view.GetState() {
	case migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_PAUSED,
		migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_RECOVER,
		migratedv1.MigrationState_MIGRATION_STATE_HANDOVER:
		return true
	}
	return false
}

// A busyError says that most migrations leave this host, and no more may.
type busyError struct{ most int }

func (e *busyError) Error() string {
	return fmt.Sprintf("%d migrations away from this host are under way, and no more are allowed", e.most)
}

// A crowdedError says that most migrations to this host are under way, and no more may be.
type crowdedError struct {
	most   int
	sender string // the source that has all of them; empty: all sources together have
}

func (e *crowdedError) Error() string {
	if e.sender == "" {
		return fmt.Sprintf("%d migrations to the destination are under way, and no more are allowed", e.most)
	}
	return fmt.Sprintf("%d migrations from %s to the destination are under way, half of what it allows, "+
		"and the rest is for other sources", e.most, e.sender)
}

const remedyCrowded = "start this one when another is over, let it wait (migrate --queue-limit), " +
	"or raise max_incoming in the destination's configuration"

// awaitTurn returns the migration.SourceConfig.Turn of migration id.
func (d *Daemon) awaitTurn(id string) func(ctx context.Context, atOnce bool, ahead func(int)) error {
	return func(ctx context.Context, atOnce bool, ahead func(int)) error {
		most := d.cfg.MaxOutgoing
		take := func() bool { return d.migrations.takeTurn(id, most) }
		switch {
		case !atOnce:
			return d.migrations.outgoing.Wait(ctx, take, ahead)
		case !take():
			return migration.WithRemedy(&busyError{most},
				"start this one when another is over, let it wait (migrate --queue-limit), "+
					"or raise max_outgoing in this host's configuration")
		}
		return nil
	}
}

// keepPlace reserves a place for a migration to this host, if addDestination would find one.
func (r *registry) keepPlace(p *place, most int) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.crowded(p.sender, most) != nil {
		return false
	}
	r.kept[p] = struct{}{}
	return true
}

// leavePlace gives a reserved place back. addDestination may have used it.
func (r *registry) leavePlace(p *place) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.kept, p)
}

// AwaitTurn waits for a place for a migration to this host, and reserves it until the call ends.
func (p *peerService) AwaitTurn(
	request *migratedv1.AwaitTurnRequest, stream grpc.ServerStreamingServer[migratedv1.AwaitTurnResponse],
) error {
	if !validID.MatchString(request.GetId()) {
		return status.Errorf(codes.InvalidArgument, "id %q cannot be used", request.GetId())
	}
	d, ctx := p.daemon, stream.Context()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(d.ctx, cancel)() // the daemon ends
	mine := &place{id: request.GetId(), sender: callerID(ctx)}
	var sendErr error
	err := d.migrations.incoming.Wait(ctx,
		func() bool { return d.migrations.keepPlace(mine, d.cfg.MaxIncoming) },
		func(ahead int) {
			if sendErr = stream.Send(&migratedv1.AwaitTurnResponse{Ahead: uint32(ahead)}); sendErr != nil {
				cancel()
			}
		})
	defer d.migrations.incoming.Advance()
	defer d.migrations.leavePlace(mine)
	switch {
	case errors.Is(err, turns.ErrFull):
		d.refusals.Refused(limits.Moving, callerNetwork(ctx), "id", request.GetId())
		return migration.ToStatus(codes.ResourceExhausted,
			migration.WithRemedy(fmt.Errorf("%d migrations wait for room at the destination: %w", mostWaiting, err),
				"start this one when others are over, or move the VM to another host"))
	case err != nil && sendErr != nil:
		return sendErr
	case err != nil:
		return status.Error(codes.Unavailable, "the daemon ends")
	}
	if err := stream.Send(&migratedv1.AwaitTurnResponse{Granted: true}); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}
