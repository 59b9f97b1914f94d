// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"

	"github.com/migrated-vm/migrated/internal/bandwidth"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// Both daemons have limits of their own, and the lowest holds:
//
//	--bandwidth, SetBandwidth ──► source: its own, if lower ──► destination: kept; its own, if lower ──► engine
//
// What is kept does not have the destination daemon's own limit in it, which may be another when it is started again.

// These are why a limit cannot be changed.
var (
	errNotPrepared = withRemedy(errors.New("the migration is not prepared yet"), "try again in a moment; migrate --bandwidth sets the limit it begins with")
	errOver        = errors.New("this migration is over")
)

// limitable says whether a migration has all that changing its limit takes: nil, or why not.
func limitable(t *Tracker) error {
	view, _ := t.Snapshot()
	switch {
	case Terminal(view.GetState()):
		return errOver
	case !view.GetPrepared():
		return errNotPrepared
	}
	return nil
}

// SetBandwidth changes the limit of a migration that is prepared, and returns the one that holds: of pages that no
// thread waits for, in bytes a second; 0: none.
func (s *Source) SetBandwidth(ctx context.Context, limit uint64) (uint64, error) {
	if err := limitable(s.Tracker); err != nil {
		return 0, err
	}
	answer, err := s.peer.LimitIncoming(ctx, &migratedv1.LimitIncomingRequest{Id: s.cfg.ID, Bandwidth: bandwidth.Lower(limit, s.cfg.Bandwidth)})
	if err != nil {
		return 0, fromPeer("set the bandwidth", s.cfg.Spec.GetDestination(), err)
	}
	return answer.GetBandwidth(), nil
}

// SetBandwidth is the destination's half of it; the limit survives this daemon.
func (d *Destination) SetBandwidth(limit uint64) (uint64, error) {
	if err := limitable(d.Tracker); err != nil {
		return 0, err
	}
	d.limitMu.Lock()
	defer d.limitMu.Unlock()
	if d.released {
		return 0, errOver
	}
	d.kept.header().bandwidth.Store(limit)
	holds := d.limit()
	d.engine.SetBandwidth(holds)
	d.log.Info("bandwidth", "limit", limit, "holds", holds)
	return holds, nil
}

// limit is the one that holds, in bytes a second; 0: none.
func (d *Destination) limit() uint64 {
	return bandwidth.Lower(d.kept.header().bandwidth.Load(), d.cfg.Bandwidth)
}
