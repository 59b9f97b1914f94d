// SPDX-License-Identifier: Apache-2.0

package pagesrv

import (
	"context"
	"crypto/sha256"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"

	"github.com/migrated-vm/migrated/pkg/pagewire"
)

// Export is the RAM of one VM while it is offered.
//
//	offered ── first request: stopped() is nil ──► serving ── Revoke, Withdraw ──► withdrawn
//	   └───────────────────────────────────────────────────── Revoke, Withdraw ──────┘
type Export struct {
	server  *Server
	id      string
	token   [sha256.Size]byte
	ram     *RAM
	stopped func(context.Context) error

	// Read by lanes for each piece of RAM.
	confirmed atomic.Bool // stopped has said yes
	withdrawn atomic.Bool

	link  link // what lanes find out about the network
	quota *quota

	// The export's part of the server's rate; guarded by shared.mu.
	weight float64
	finish float64

	asking      sync.Mutex    // one lane at a time asks stopped
	withdrawing sync.Mutex    // one Withdraw at a time waits for the lanes
	done        chan struct{} // closed by Revoke

	mu    sync.Mutex // guards what follows: lanes come and go
	lanes map[*lane]struct{}
	past  Stats // of lanes that have ended

	// park is nil except in tests, which stop a lane at the point that is named.
	park func(point string)
}

// SetWeight changes the export's part of the rate that Server.SetBandwidth gives to all. The weight is 1 at first; 0
// means 1.
func (e *Export) SetWeight(weight uint32) {
	e.server.shared.mu.Lock()
	defer e.server.shared.mu.Unlock()
	e.weight = float64(max(1, weight))
}

// confirm returns nil once the VM was seen stopped.
func (e *Export) confirm(ctx context.Context) error {
	if e.confirmed.Load() {
		return nil
	}
	e.asking.Lock()
	defer e.asking.Unlock()
	if e.confirmed.Load() {
		return nil
	}
	if err := e.stopped(ctx); err != nil {
		return endLane(codes.FailedPrecondition, ErrNotStopped, "%w", err)
	}
	e.confirmed.Store(true)
	return nil
}

// open makes a lane, as long as there are not too many.
func (e *Export) open(ctx context.Context) (*lane, error) {
	announced := pagewire.Announced(metadata.ValueFromIncomingContext(ctx, pagewire.CompressionKey))
	bulk := one(ctx, pagewire.LaneKey) == pagewire.BulkLane
	l := &lane{
		export: e, bulk: bulk, loses: one(ctx, pagewire.LostKey) == pagewire.CanLose,
		packer: newPacker(announced, bulk, &e.link), idle: make(chan struct{}, 1),
	}
	if p, ok := peer.FromContext(ctx); ok {
		l.peer = p.Addr.String()
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.withdrawn.Load() {
		return nil, endLane(codes.Aborted, ErrWithdrawn, "")
	}
	if len(e.lanes) >= MaxLanes {
		return nil, endLane(codes.ResourceExhausted, ErrTooManyLanes, "%d are open", MaxLanes)
	}
	e.lanes[l] = struct{}{}
	return l, nil
}

func (e *Export) close(l *lane) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.lanes, l)
	e.past.add(l.counters.load())
}

// Revoke ends all lanes. No read of RAM begins after that, and nothing is sent of what a read that is under way
// brings: the VM may be continued at once. Revoke waits for nothing, because such a read may take long, where memory
// was swapped to a device that does not answer. Peers get codes.Aborted, and codes.PermissionDenied when they open a
// lane again. It may be called more than once.
func (e *Export) Revoke() {
	if e.withdrawn.CompareAndSwap(false, true) {
		close(e.done)
		e.server.forget(e)
	}
}

// Withdraw is Revoke, and returns when no read of RAM is under way. The RAM may be closed then. It may be called more
// than once, and waits each time.
func (e *Export) Withdraw() {
	e.withdrawing.Lock()
	defer e.withdrawing.Unlock()
	e.Revoke()
	e.mu.Lock()
	open := make([]*lane, 0, len(e.lanes))
	for l := range e.lanes {
		open = append(open, l)
	}
	e.mu.Unlock()
	for _, l := range open {
		l.awaitIdle()
	}
}
