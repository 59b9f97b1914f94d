// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/internal/pagelane"
	"github.com/migrated-vm/migrated/internal/pagewire"
	"github.com/migrated-vm/migrated/pkg/pagesrv"
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
	cancel context.CancelFunc
}

type laneConfig struct {
	id, token string
	addresses []string
	protocol  uint32 // that the migration keeps to
	demand    int
	dial      func(ctx context.Context, address string) (net.Conn, error)
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
	return nil, noLanes(cfg.id, failures)
}

// noLanes says why no address serves the pages, and what to do about it.
func noLanes(id string, failures []error) error {
	err := fmt.Errorf("no page lanes to the source: %w", errors.Join(failures...))
	refused := func(err error) bool {
		return serverSays(err, codes.PermissionDenied, pagesrv.ErrRefused)
	}
	switch {
	case outOfTime(err.Error()):
		return withRemedy(err, "correct the clocks of both hosts, or renew the certificates; it is tried again by itself, "+
			"with the files as they are then")
	case slices.ContainsFunc(failures, refused): // it was started again, and has not taken the VM up
		return withRemedy(withReason(err, migratedv1.Reason_REASON_PAGES_REFUSED), fmt.Sprintf("ask the source's daemon, which answers, "+
			"what became of the VM's memory: migrated status %s; where it knows nothing of it, or its QEMU has ended, "+
			"the VM's memory is lost", id))
	default:
		return withRemedy(withReason(err, migratedv1.Reason_REASON_PAGES_UNREACHABLE), "make the source daemon's listen address reachable from this host, or name one that is "+
			"with its 'advertise' setting")
	}
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
		// The source packs pages where it pays, but only in a way that this daemon says it can unpack.
		md := metadata.Pairs(pagewire.MigrationIDKey, cfg.id, pagewire.MigrationTokenKey, cfg.token,
			pagewire.CompressionKey, pagewire.Unpackable, pagewire.ProtocolKey, strconv.FormatUint(uint64(cfg.protocol), 10))
		if i == cfg.demand {
			md.Set(pagewire.LaneKey, pagewire.BulkLane)
		}
		lane, err := openLane(ctx, cfg, address, md)
		if err != nil {
			return nil, fmt.Errorf("page server %s: %w", address, &peerError{status.Convert(err)})
		}
		if i < cfg.demand {
			l.demand = append(l.demand, lane)
		} else {
			l.bulk = lane
		}
	}
	return l, nil
}

func openLane(ctx context.Context, cfg laneConfig, address string, md metadata.MD) (postcopy.Lane, error) {
	conn, err := cfg.dial(ctx, address)
	if err != nil {
		return nil, err
	}
	return pagelane.Open(ctx, conn, md)
}

// close ends the lanes; what was on its way is asked for again.
func (l *lanes) close() { l.cancel() }
