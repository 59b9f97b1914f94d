// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"sync/atomic"
	"time"

	"github.com/migrated-vm/migrated/internal/pagewire"
)

// sweep asks for what no fault has asked for, on the bulk lane, from where faults happen onwards, until nothing is
// missing. Faults come first: pace.go says how much the sweep may have in flight, and that it is less while one waits. Where
// a limit is set, budget.go says when it may go on.
func (s *session) sweep() error {
	defer func() { _ = s.bulk.stream.CloseSend() }()
	select {
	case <-s.e.sweeping:
	case <-s.ctx.Done():
		return nil
	}
	request := pagewire.Request{Ranges: make([]pagewire.Range, 0, sweepRanges)}
	var fronts fronts
	paid := time.NewTimer(0)
	defer paid.Stop()
	for {
		room, ok := s.awaitRoom(paid)
		if !ok {
			return nil
		}
		cursor := fronts.next(&s.e.hints)
		request.Ranges = request.Ranges[:0]
		bytes, next := s.claim(&request, *cursor, room)
		*cursor = next
		if bytes == 0 {
			if _, ok := s.e.pages.nextMissing(*cursor); !ok {
				return s.drain()
			}
			continue // faults were faster
		}
		s.pace.asked(int64(bytes), s.e.now())
		if err := s.bulk.ask(&request, bytes); err != nil {
			return err
		}
	}
}

// hints are the pages after the last faults of each thread, + 1; 0: the sweep has taken it. Threads share them.
type hints [sweepFronts]atomic.Uint64

func (h *hints) set(thread uint32, page uint64) { h[thread%sweepFronts].Store(page + 1) }

// fronts are the places from which the sweep goes on, in turns: where threads fault, one for each. With a single one
// the sweep would leave each of two threads that go through memory when the other has faulted.
type fronts struct {
	cursors [sweepFronts]uint64
	open    [sweepFronts]bool
	last    int
}

// next returns the place whose turn it is. Before the first fault that is the beginning of memory.
func (f *fronts) next(h *hints) *uint64 {
	for i := range f.cursors {
		if page := h[i].Swap(0); page != 0 {
			f.cursors[i], f.open[i] = page-1, true
		}
	}
	for i := 1; i <= sweepFronts; i++ {
		if at := (f.last + i) % sweepFronts; f.open[at] {
			f.last = at
			return &f.cursors[at]
		}
	}
	return &f.cursors[0]
}

// claim claims missing pages from cursor on, of so many bytes or one page, and puts them into the request. Where faults
// have left holes in what is missing, it takes several ranges: a message for each would cost more than its pages. It
// returns how many bytes it has claimed, and where to go on.
func (s *session) claim(request *pagewire.Request, cursor, room uint64) (bytes, next uint64) {
	for len(request.Ranges) < sweepRanges && bytes < room {
		p, ok := s.e.pages.nextMissing(cursor)
		if !ok {
			break
		}
		b := s.e.holder(p)
		most := (room - bytes) >> b.shift
		if bytes == 0 {
			most = max(1, most)
		}
		if most == 0 {
			break
		}
		n := s.e.pages.claimSweep(p, min(most, b.end()-p))
		cursor = p + max(1, n) // a fault may have been faster
		if n == 0 {
			continue
		}
		s.e.at("swept", p)
		request.Ranges = append(request.Ranges, pagewire.Range{Block: uint32(b.index), Offset: (p - b.first) << b.shift, Length: uint32(n << b.shift)})
		bytes += n << b.shift
	}
	return bytes, cursor
}

// awaitRoom waits until the sweep may ask for a run and says of how many bytes. It says false when the session is over. The
// timer is its own.
func (s *session) awaitRoom(paid *time.Timer) (bytes uint64, ok bool) {
	for {
		if wait := s.e.budget.wait(s.e.now()); wait > 0 {
			paid.Reset(time.Duration(wait))
		} else if bytes := s.pace.room(s.bulk.asked.Load(), s.faultsWait()); bytes > 0 {
			return bytes, true
		}
		select {
		case <-paid.C:
		case <-s.e.budget.changed:
		case <-s.bulk.answered:
		case <-s.ctx.Done():
			return 0, false
		}
	}
}

// faultsWait says whether threads wait for pages that are on their way.
func (s *session) faultsWait() bool { return s.e.pending.count.Load() > 0 }

// drain waits for the answers to all that the sweep has asked for, and makes sure that they answered it.
func (s *session) drain() error {
	for s.bulk.asked.Load() > 0 {
		select {
		case <-s.bulk.answered:
		case <-s.ctx.Done():
			return nil
		}
	}
	if p, ok := s.e.pages.firstSwept(); ok {
		b := s.e.holder(p)
		return protocolError("it answered something else in place of the page at %#x of block %d (%s)", (p-b.first)<<b.shift, b.index, b.ID)
	}
	<-s.ctx.Done() // the lane stays open until then: its end would look like its loss
	return nil
}
