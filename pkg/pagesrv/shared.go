// SPDX-License-Identifier: Apache-2.0

package pagesrv

import (
	"container/heap"
	"context"
	"sync"
	"time"

	"github.com/migrated-vm/migrated/pkg/pagewire"
)

const (
	// sharedLag is how long unused rate may be caught up with: timers fire late, and that time must not be lost.
	sharedLag = 5 * time.Millisecond
	// leastCarried is what a reply counts at least, in bytes: a reply of zeros alone crosses the network, too.
	leastCarried = 256
)

// shared limits the rate of the bulk lanes of all exports together. Each export that has something to send gets a share
// by its weight. Demand lanes are exempt: a page that a thread waits for is neither held up nor counted.
//
// It is start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996). A reply has a start tag: the finish tag of the one
// before it from the same export, or the virtual time, if that is later. Its finish tag is bytes/weight after that. The
// reply with the lowest start tag goes first, and the virtual time is then that tag.
type shared struct {
	mu      sync.Mutex
	rate    float64 // bytes a second; 0: there is no limit
	free    time.Time
	virtual float64 // bytes of an export of weight 1
	waiting turns
	timer   *time.Timer // nil: it was never needed
}

// A turn belongs to one bulk lane, which has one reply at a time.
type turn struct {
	start float64
	bytes int
	index int // in turns; -1: the lane does not wait
	ready chan struct{}
}

func newTurn() *turn { return &turn{index: -1, ready: make(chan struct{}, 1)} }

// setRate changes the rate at once; 0: there is no limit.
func (s *shared) setRate(bytesPerSecond uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rate = float64(bytesPerSecond)
	s.free = time.Time{}
	s.dispatch()
}

// wait returns when a reply of so many bytes of an export may be sent. The error is why ctx ended.
func (s *shared) wait(ctx context.Context, e *Export, t *turn, bytes int) error {
	s.mu.Lock()
	if s.rate == 0 {
		s.mu.Unlock()
		return nil
	}
	t.bytes = max(bytes, leastCarried)
	t.start = max(e.finish, s.virtual)
	e.finish = t.start + float64(t.bytes)/e.weight
	heap.Push(&s.waiting, t)
	s.dispatch()
	s.mu.Unlock()
	select {
	case <-t.ready:
		return nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if t.index >= 0 {
		heap.Remove(&s.waiting, t.index)
	} else {
		<-t.ready // its turn came at this moment
	}
	return context.Cause(ctx)
}

// dispatch releases the replies that are due, and sets the timer for the next one. The caller holds mu.
func (s *shared) dispatch() {
	for len(s.waiting) > 0 {
		now := time.Now()
		if ahead := s.free.Sub(now); s.rate > 0 && ahead > 0 {
			if s.timer == nil {
				s.timer = time.AfterFunc(ahead, s.due)
			} else {
				s.timer.Reset(ahead)
			}
			return
		}
		t := heap.Pop(&s.waiting).(*turn)
		s.virtual = t.start
		if s.rate > 0 {
			if behind := now.Add(-sharedLag); s.free.Before(behind) {
				s.free = behind
			}
			s.free = s.free.Add(time.Duration(float64(t.bytes) / s.rate * float64(time.Second)))
		}
		t.ready <- struct{}{}
	}
}

func (s *shared) due() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dispatch()
}

// turns is a heap of the lanes that wait, the lowest start tag first.
type turns []*turn

func (t turns) Len() int           { return len(t) }
func (t turns) Less(i, j int) bool { return t[i].start < t[j].start }
func (t turns) Swap(i, j int) {
	t[i], t[j] = t[j], t[i]
	t[i].index, t[j].index = i, j
}

func (t *turns) Push(x any) {
	one := x.(*turn)
	one.index = len(*t)
	*t = append(*t, one)
}

func (t *turns) Pop() any {
	last := len(*t) - 1
	one := (*t)[last]
	(*t)[last], *t, one.index = nil, (*t)[:last], -1
	return one
}

// A sharingStream is the stream of a bulk lane. It waits for its part of the rate that all have. It is below a
// pacedStream, which measures that wait, too: a lane that has only a part of the network should pack as on a slow
// network.
type sharingStream struct {
	messageStream
	ctx    context.Context //nolint:containedctx // of the lane, as the stream is
	shared *shared
	export *Export
	turn   *turn
}

func (s *sharingStream) Send(reply *pagewire.Reply) error {
	if err := s.shared.wait(s.ctx, s.export, s.turn, reply.Carried()); err != nil {
		return err
	}
	return s.messageStream.Send(reply)
}
