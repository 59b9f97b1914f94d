// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/pkg/pagelane"
	"github.com/migrated-vm/migrated/pkg/pagewire"
	"github.com/migrated-vm/migrated/pkg/postcopy"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// laneTimeout bounds how long it takes to open all lanes to one address.
const laneTimeout = 5 * time.Second

// lanes are the destination's connections to the source's page server: one demand lane per fault worker, and the bulk
// lane. Each lane has a connection of its own, so that an urgent page never queues behind bulk data. The engine calls
// openBulk to open further bulk lanes where they make the sweep faster.
type lanes struct {
	demand   []postcopy.Lane
	bulk     postcopy.Lane
	openBulk func(context.Context) (postcopy.Lane, error)
	cancel   context.CancelFunc
}

type laneConfig struct {
	id, token string
	addresses []string
	protocol  uint32 // the version that both daemons use
	canLose   bool   // this host can poison lost pages, see pagewire.LostKey
	demand    int    // number of demand lanes
	dial      func(ctx context.Context, address string) (net.Conn, error)
}

func (d *Destination) laneConfig() laneConfig {
	return laneConfig{
		id: d.cfg.Request.GetId(), token: d.cfg.Request.GetToken(),
		addresses: d.addresses(), protocol: d.cfg.Request.GetProtocol(), canLose: d.engine != nil && d.engine.CanLose(),
		demand: d.cfg.FaultWorkers, dial: d.cfg.Dial,
	}
}

// openLanes opens all lanes through the first address that serves them. They live until close, or until ctx ends.
func openLanes(ctx context.Context, cfg laneConfig) (*lanes, error) {
	var failures []error
	for _, address := range cfg.addresses {
		l, err := openLanesAt(ctx, cfg, address)
		if err == nil {
			return l, nil
		}
		failures = append(failures, err)
	}
	if len(failures) == 0 {
		failures = append(failures, errors.New("the source names no address at which it serves pages"))
	}
	return nil, noLanesError(cfg.id, failures)
}

// noLanesError returns the error for the case that no address serves the pages, with the reason and the remedy.
func noLanesError(id string, failures []error) error {
	err := fmt.Errorf("no page lanes to the source: %w", errors.Join(failures...))
	refused := func(err error) bool {
		return serverSays(err, migratedv1.Reason_REASON_PAGES_REFUSED)
	}
	switch {
	case outOfTime(err.Error()):
		return withRemedy(err, "correct the clocks of both hosts, or renew the certificates; it is tried again by itself, "+
			"with the files as they are then")
	case slices.ContainsFunc(failures, refused): // a restarted source daemon that has not taken the migration up
		return withRemedy(withReason(err, migratedv1.Reason_REASON_PAGES_REFUSED),
			fmt.Sprintf("run 'migrated status %s' on the source: its daemon answers "+
				"but does not serve the VM's memory. If it does not know the migration, "+
				"or the VM's QEMU there has ended, that memory is lost", id))
	default:
		return withRemedy(withReason(err, migratedv1.Reason_REASON_PAGES_UNREACHABLE),
			"make the source daemon's listen address reachable from this host, "+
				"or name one that is with its 'advertise' setting")
	}
}

func openLanesAt(ctx context.Context, cfg laneConfig, address string) (_ *lanes, err error) {
	l := &lanes{}
	ctx, l.cancel = context.WithCancel(ctx)
	expire := time.AfterFunc(laneTimeout, l.cancel)
	defer func() {
		if !expire.Stop() { // the timeout is the cause of whatever failed
			err = fmt.Errorf("page server %s did not answer within %v", address, laneTimeout)
		}
		if err != nil {
			l.close()
		}
	}()
	for i := range cfg.demand + 1 {
		lane, err := openLane(ctx, cfg, address, i == cfg.demand)
		if err != nil {
			return nil, fmt.Errorf("page server %s: %w", address, &peerError{status.Convert(err)})
		}
		if i < cfg.demand {
			l.demand = append(l.demand, lane)
		} else {
			l.bulk = lane
		}
	}
	l.openBulk = func(opening context.Context) (postcopy.Lane, error) { return openMore(ctx, opening, cfg, address) }
	return l, nil
}

// openMore opens another bulk lane to the address of the others. The lane lives until ctx ends, as they do. opening
// bounds how long it takes to open.
func openMore(ctx, opening context.Context, cfg laneConfig, address string) (postcopy.Lane, error) {
	ctx, cancel := context.WithCancel(ctx)
	opening, stop := context.WithTimeout(opening, laneTimeout)
	defer stop()
	given := context.AfterFunc(opening, cancel)
	lane, err := openLane(ctx, cfg, address, true)
	if !given() { // the end of opening is the cause of whatever failed
		err = fmt.Errorf("page server %s: another lane: %w", address, context.Cause(opening))
	}
	if err != nil {
		cancel() // also closes a lane that was opened too late
		return nil, err
	}
	return lane, nil
}

func openLane(ctx context.Context, cfg laneConfig, address string, bulk bool) (postcopy.Lane, error) {
	// The source compresses pages where that pays, but only in a way that this daemon says it can unpack.
	call := pagewire.Call{
		ID: cfg.id, Token: cfg.token, Protocol: cfg.protocol, Bulk: bulk, Packed: true, CanLose: cfg.canLose,
	}
	conn, err := cfg.dial(ctx, address)
	if err != nil {
		return nil, err
	}
	return pagelane.Open(ctx, conn, call.Metadata())
}

// close closes all lanes. Pages that were in flight are requested again over new ones.
func (l *lanes) close() { l.cancel() }
