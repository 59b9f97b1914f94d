// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/internal/pagewire"
	"github.com/migrated-vm/migrated/pkg/postcopy"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// laneTimeout bounds opening the lanes through one address.
const laneTimeout = 5 * time.Second

// lanes are the destination's connections to the source's page server: one
// demand lane a fault worker and the bulk lane, each on a connection of its own
// so that an urgent page never queues behind bulk bytes.
type lanes struct {
	demand []postcopy.Lane
	bulk   postcopy.Lane
	conns  []*grpc.ClientConn
	cancel context.CancelFunc
}

type laneConfig struct {
	id, token string
	addresses []string
	protocol  uint32 // that the migration keeps to
	demand    int
	dial      Dialer
}

func (d *Destination) laneConfig() laneConfig {
	return laneConfig{
		id: d.cfg.Request.GetId(), token: d.cfg.Request.GetToken(),
		addresses: d.addresses(), protocol: d.cfg.Request.GetProtocol(),
		demand: d.cfg.FaultWorkers, dial: d.cfg.Dial,
	}
}

// openLanes opens every lane through the first address that serves them. They
// live until close or until ctx ends.
func openLanes(ctx context.Context, cfg laneConfig) (*lanes, error) {
	var failures []error
	for _, address := range cfg.addresses {
		l, err := openLanesAt(ctx, cfg, address)
		if err == nil {
			return l, nil
		}
		failures = append(failures, err)
	}
	err := fmt.Errorf("no page lanes to the source: %w", errors.Join(failures...))
	return nil, withRemedy(err, "make the source daemon's listen address reachable from this host, or name one that is with its 'advertise' setting")
}

func openLanesAt(ctx context.Context, cfg laneConfig, address string) (_ *lanes, err error) {
	l := &lanes{}
	ctx, l.cancel = context.WithCancel(ctx)
	expire := time.AfterFunc(laneTimeout, l.cancel)
	defer func() {
		if !expire.Stop() && err == nil {
			err = fmt.Errorf("page server %s did not answer within %v", address, laneTimeout)
		}
		if err != nil {
			l.close()
		}
	}()
	for i := range cfg.demand + 1 {
		kind := ctx
		if i == cfg.demand {
			kind = metadata.AppendToOutgoingContext(ctx, pagewire.LaneKey, pagewire.BulkLane)
		}
		lane, err := l.open(kind, cfg, address)
		if err != nil {
			return nil, err
		}
		if i < cfg.demand {
			l.demand = append(l.demand, lane)
		} else {
			l.bulk = lane
		}
	}
	return l, nil
}

func (l *lanes) open(ctx context.Context, cfg laneConfig, address string) (postcopy.Lane, error) {
	conn, err := cfg.dial(address, withToken(cfg.id, cfg.token))
	if err != nil {
		return nil, fmt.Errorf("page server %s: %w", address, err)
	}
	l.conns = append(l.conns, conn)
	// The source packs pages where it pays, but only in a way that this daemon says it can unpack.
	ctx = metadata.AppendToOutgoingContext(ctx, pagewire.CompressionKey, pagewire.Unpackable,
		pagewire.ProtocolKey, strconv.FormatUint(uint64(cfg.protocol), 10))
	lane, err := migratedv1.NewPageServiceClient(conn).Fetch(ctx)
	if err == nil {
		// The header says that the lane is accepted.
		_, err = lane.Header()
	}
	if err != nil {
		return nil, fmt.Errorf("page server %s: %w", address, laneError(lane, err))
	}
	return lane, nil
}

// laneError prefers the status that a refused lane ended with.
func laneError(lane postcopy.Lane, err error) error {
	if status.Code(err) == codes.Unknown && lane != nil {
		if statusErr := lane.RecvMsg(new(pagewire.Reply)); statusErr != nil {
			err = statusErr
		}
	}
	return &peerError{status.Convert(err)}
}

func (l *lanes) close() {
	l.cancel()
	for _, conn := range l.conns {
		_ = conn.Close() // what was on its way is asked for again
	}
}
