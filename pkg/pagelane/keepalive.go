// SPDX-License-Identifier: Apache-2.0

package pagelane

import (
	"fmt"
	"math"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// leastHeard is how many bytes between two ticks are a sign of life by themselves. It is more than the answers to
// PINGs.
const leastHeard = 1 << 10

// keepalive detects a source that stopped answering. While the source owes an answer, it sends a PING every interval.
// It ends the lane if within one interval the PING was not answered and hardly any data came. TCP does not detect this:
// it knows that the other host is up, but not that the source hangs, or waits for bytes that will never come because a
// length was damaged on the way.
//
// The source answers a PING after the requests before it. On a slow network these take longer than the interval, so
// data that arrives is a sign of life, too.
//
// A source that owes nothing gets no PING. Nobody waits for it, and a gRPC server closes a connection after more than
// two PINGs while it has nothing to send (grpc-go's keepalive.EnforcementPolicy).
type keepalive struct {
	lane  *Client // whose source is asked
	every time.Duration
	timer *time.Timer

	owed    atomic.Int64 // bytes of RAM that were asked for and not answered; plus 1 once the end was asked for
	sending atomic.Bool  // a request is on its way, or waits for the source to take it
	reading atomic.Bool  // a goroutine is reading, so an answer would be seen
	silent  atomic.Bool  // the lane has ended because the source was silent
	stopped atomic.Bool

	// Owned by the timer's goroutine.
	receivedThen uint64 // Client.received at the last PING
	awaited      uint64 // value of acks once the last PING is answered; 0: none is awaited
}

// newKeepalive returns a keepalive that has not started.
func newKeepalive(lane *Client, every time.Duration) *keepalive {
	k := &keepalive{lane: lane, every: every}
	k.timer = time.AfterFunc(math.MaxInt64, k.tick)
	return k
}

func (k *keepalive) start() { k.timer.Reset(k.every) }

// stop ends the keepalive permanently.
func (k *keepalive) stop() {
	k.stopped.Store(true)
	k.timer.Stop()
}

// tick is called every interval.
func (k *keepalive) tick() {
	received, acks := k.lane.received.Load(), k.lane.acks.Load()
	if k.owed.Load() <= 0 && !k.sending.Load() {
		k.awaited = 0
		k.wait()
		return
	}
	if acks < k.awaited && received-k.receivedThen < leastHeard && k.reading.Load() {
		k.silent.Store(true)
		k.lane.end()
		return
	}
	k.receivedThen, k.awaited = received, acks+1
	if k.wait() { // first: the next tick ends the lane if this PING cannot be sent
		_ = k.lane.ping() // the receiver learns why not
	}
}

// wait arranges for the next tick, and returns true, unless the keepalive has stopped.
func (k *keepalive) wait() bool {
	k.timer.Reset(k.every)
	if k.stopped.Load() {
		k.timer.Stop()
		return false
	}
	return true
}

// explain returns the reason why the lane ended, if that was silence, and otherwise err.
func (k *keepalive) explain(err error) error {
	if !k.silent.Load() {
		return err
	}
	return status.Error(codes.Unavailable, fmt.Sprintf("the page server has not answered for %v", k.every))
}
