// SPDX-License-Identifier: Apache-2.0

package postcopy

import "github.com/migrated-vm/migrated/internal/pagewire"

// sweep asks for what no fault has asked for, on the bulk lane, from where faults happen onwards, until nothing is
// missing. Faults come first: pace.go says how much the sweep may have in flight, and that it is less while one waits.
func (s *session) sweep() error {
	defer func() { _ = s.bulk.stream.CloseSend() }()
	select {
	case <-s.e.sweeping:
	case <-s.ctx.Done():
		return nil
	}
	request := pagewire.Request{Ranges: make([]pagewire.Range, 0, sweepRanges)}
	for cursor := uint64(0); ; {
		room, ok := s.awaitRoom()
		if !ok {
			return nil
		}
		if hint := s.e.hint.Swap(0); hint != 0 {
			cursor = hint - 1
		}
		request.Ranges = request.Ranges[:0]
		bytes := uint64(0)
		bytes, cursor = s.claim(&request, cursor, room)
		if bytes == 0 {
			if _, ok := s.e.pages.nextMissing(cursor); !ok {
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

// claim claims missing pages from cursor on, of so many bytes or one page, and puts them into the request. Where faults
// have left holes in what is missing, it takes several ranges: a message for each would cost more than its pages. It
// returns how many bytes it has claimed, and where to go on.
func (s *session) claim(request *pagewire.Request, cursor, room uint64) (bytes, next uint64) {
	for len(request.Ranges) < sweepRanges {
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

// awaitRoom waits until the sweep may ask for a run and says of how many bytes. It says false when the session is over.
func (s *session) awaitRoom() (bytes uint64, ok bool) {
	for {
		if bytes := s.pace.room(s.bulk.asked.Load(), s.faultsWait()); bytes > 0 {
			return bytes, true
		}
		select {
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
