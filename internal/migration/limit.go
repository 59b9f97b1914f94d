// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"

	"github.com/migrated-vm/migrated/internal/bandwidth"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// Each daemon has a bandwidth limit of its own, and the lowest limit applies:
//
//	--bandwidth, SetBandwidth ──► source: its own, if lower ──► destination: kept; its own, if lower ──► engine
//
// The kept value does not include the destination daemon's own limit: that may differ when the daemon is restarted.

// Why a limit cannot be changed.
var (
	errNotPrepared = withRemedy(errors.New("the migration is not prepared yet"),
		"try again in a moment; migrate --bandwidth sets the limit it begins with")
	errOver = errors.New("this migration is over")
)

// checkLimitChangeable returns nil if the migration is in a state in which its limit can be changed, and why not
// otherwise.
func checkLimitChangeable(t *Tracker) error {
	view, _ := t.Snapshot()
	switch {
	case Terminal(view.GetState()):
		return errOver
	case !view.GetPrepared():
		return errNotPrepared
	}
	return nil
}

// SetBandwidth changes the limit of a prepared migration and returns the one that applies. The limit counts pages that
// no thread waits for, in bytes per second; 0: no limit.
func (s *Source) SetBandwidth(ctx context.Context, limit uint64) (uint64, error) {
	if err := checkLimitChangeable(s.Tracker); err != nil {
		return 0, err
	}
	conn := s.lastIncoming.conn.Load() // not s.peer, which the goroutine of run owns and replaces
	if conn == nil {
		return 0, errNotPrepared
	}
	s.limitMu.Lock() // a source that prepares afresh ends the call when it closes conn, then asks for the limit
	defer s.limitMu.Unlock()
	answer, err := migratedv1.NewPeerServiceClient(conn).LimitIncoming(ctx, &migratedv1.LimitIncomingRequest{
		Id: s.cfg.ID, Bandwidth: bandwidth.Lower(limit, s.cfg.Bandwidth),
	})
	if err != nil {
		return 0, fromPeer("set the bandwidth", s.cfg.Spec.GetDestination(), err)
	}
	s.limit = limit
	return answer.GetBandwidth(), nil
}

// bandwidthLimit returns the limit that a destination is to begin with: the one that was set last, or this
// daemon's own.
func (s *Source) bandwidthLimit() uint64 {
	s.limitMu.Lock()
	defer s.limitMu.Unlock()
	return bandwidth.Lower(s.limit, s.cfg.Bandwidth)
}

// SetBandwidth is the destination's half of it. A restarted daemon keeps the limit.
func (d *Destination) SetBandwidth(limit uint64) (uint64, error) {
	if err := checkLimitChangeable(d.Tracker); err != nil {
		return 0, err
	}
	d.limitMu.Lock()
	defer d.limitMu.Unlock()
	if d.released || d.engine == nil { // all memory is here
		return 0, errOver
	}
	d.kept.header().bandwidth.Store(limit)
	holds := d.bandwidthLimit()
	d.engine.SetBandwidth(holds)
	d.log.Info("bandwidth", "limit", limit, "holds", holds)
	return holds, nil
}

// bandwidthLimit returns the limit that applies, in bytes per second; 0: no limit.
func (d *Destination) bandwidthLimit() uint64 {
	return bandwidth.Lower(d.kept.header().bandwidth.Load(), d.cfg.Bandwidth)
}
