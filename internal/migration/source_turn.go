// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/internal/units"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// MaxQueueLimit is the largest MigrationSpec.queue_limit.
const MaxQueueLimit = 7 * 24 * time.Hour

const (
	// defaultQueueLimit is the queue limit of a MigrationSpec that has none.
	defaultQueueLimit = time.Hour
	// turnPause is the time between two attempts to queue at a destination whose daemon went away meanwhile.
	turnPause = time.Second
)

// errNoTurn says that a migration waited for its turn for as long as it may.
var errNoTurn = withReason(errors.New("its turn did not come in time"), migratedv1.Reason_REASON_NO_TURN)

// queueLimit returns how long a migration may wait for its turn; 0: it must not wait.
func queueLimit(spec *migratedv1.MigrationSpec) time.Duration {
	if spec.GetQueueLimit() == nil {
		return defaultQueueLimit
	}
	return spec.GetQueueLimit().AsDuration()
}

// awaitTurn waits until this migration may begin: first at the destination, which keeps room for it until keep is
// called, and then at this host. The order is the same for all migrations: one that waits for its turn at its source
// already has room at its destination. So hosts that send VMs to each other do not deadlock. The VM is looked at only
// afterwards, because it may change during the wait.
func (s *Source) awaitTurn(ctx context.Context) (keep func(), err error) {
	limit := queueLimit(s.cfg.Spec)
	why := withRemedy(fmt.Errorf("%w: it waited for %v, as long as its queue_limit lets it", errNoTurn, limit),
		"start it again when others are over, or give it longer (migrate --queue-limit)")
	ctx, cancel := context.WithTimeoutCause(ctx, limit, why)
	defer cancel()
	keep = func() {}
	if limit > 0 { // else PrepareIncoming fails if there is no room
		if keep, err = s.awaitRoom(ctx); err != nil {
			return keep, err
		}
	}
	if s.cfg.Turn != nil {
		err = s.cfg.Turn(ctx, limit == 0, func(ahead int) {
			s.showWaiting("this host has as many migrations under way as it may send at once (max_outgoing)", ahead)
		})
	}
	s.update(func(m *migratedv1.Migration) { m.Waiting = "" })
	return keep, err
}

// showWaiting shows what the migration waits for. ahead is the number of migrations before it.
func (s *Source) showWaiting(what string, ahead int) {
	place := "it is the next"
	if ahead > 0 {
		place = units.Plural(uint64(ahead), "migration") + " before it"
	}
	s.update(func(m *migratedv1.Migration) { m.Waiting = what + "; " + place })
}

// awaitRoom waits for room at the destination. It fails if ctx ends, or if the destination refuses to queue the
// migration. If the destination cannot be reached, or keeps no queue, awaitRoom returns nil, and prepare then reports
// what is wrong. The caller calls keep to give the room back.
func (s *Source) awaitRoom(ctx context.Context) (keep func(), err error) {
	nothing := func() {}
	conn, err := s.cfg.Dial(s.cfg.Spec.GetDestination())
	if err != nil {
		return nothing, nil //nolint:nilerr // prepare reports it
	}
	keepCtx, endKeep := context.WithCancel(context.WithoutCancel(ctx)) // keeps the room after ctx has ended
	keep = func() {
		endKeep()
		_ = conn.Close() // the answer does not matter
	}
	for queued := false; ; {
		answered, err := s.queueAtDestination(ctx, keepCtx, migratedv1.NewPeerServiceClient(conn))
		queued = queued || answered
		switch {
		case err == nil:
			return keep, nil
		case ctx.Err() != nil:
			return keep, context.Cause(ctx)
		case status.Code(err) == codes.ResourceExhausted:
			return keep, fromPeer("wait for room", s.cfg.Spec.GetDestination(), err)
		case !queued || status.Code(err) != codes.Unavailable:
			s.log.Debug("no queue at the destination", "error", err)
			return keep, nil
		}
		select { // its daemon is being restarted
		case <-time.After(turnPause):
		case <-ctx.Done():
			return keep, context.Cause(ctx)
		}
	}
}

// queueAtDestination calls AwaitTurn and returns when the turn has come. The call, which keeps the room, then goes on
// until keepCtx ends. answered says that the destination has answered.
func (s *Source) queueAtDestination(
	ctx, keepCtx context.Context, peer migratedv1.PeerServiceClient,
) (answered bool, err error) {
	callCtx, hangUp := context.WithCancel(keepCtx)
	defer context.AfterFunc(ctx, hangUp)()
	defer func() {
		if err != nil {
			hangUp()
		}
	}()
	var stream grpc.ServerStreamingClient[migratedv1.AwaitTurnResponse]
	stream, err = peer.AwaitTurn(callCtx, &migratedv1.AwaitTurnRequest{Id: s.cfg.ID})
	for err == nil {
		var answer *migratedv1.AwaitTurnResponse
		if answer, err = stream.Recv(); err != nil {
			break
		}
		if answered = true; answer.GetGranted() {
			return answered, nil
		}
		s.showWaiting("the destination has as many migrations under way as it takes at once (max_incoming)",
			int(answer.GetAhead()))
	}
	return answered, err
}
