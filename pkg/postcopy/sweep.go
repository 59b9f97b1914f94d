// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"sync/atomic"
	"time"

	"github.com/migrated-vm/migrated/internal/pagewire"
)

// sweep asks for what no fault has asked for, on the bulk lane, from where faults happen onwards, until nothing is
// missing, and installs what comes. One goroutine does both: a reply is what makes room for the next run. Faults come first:
// pace.go says how much the sweep may have in flight, and that it is less while one waits. Where a limit is set, budget.go
// says when it may go on.
func (s *session) sweep() {
	l := s.bulk
	defer close(l.ended)
	defer l.reply.Release()
	if s.fill(l) {
		_ = l.stream.CloseSend() // the source ends the lane
		for s.take(l) {
		}
	}
}

// fill does so until the session is over. It says false when the lane is, too.
func (s *session) fill(l *lane) bool {
	request := pagewire.Request{Ranges: make([]pagewire.Range, 0, sweepRanges)}
	if !s.awaitStart(l, &request) {
		return false
	}
	fronts := fronts{firsts: s.e.firsts()}
	paid := time.NewTimer(0)
	defer paid.Stop()
	missing := true
	for s.ctx.Err() == nil {
		wait := s.e.budget.wait(s.e.now())
		room := s.pace.room(l.asked.Load(), s.faultsWait())
		if missing && wait == 0 && room > 0 {
			cursor := fronts.next(&s.e.hints)
			if at := fronts.first(s.e.pages); at != nil {
				cursor = at
			}
			request.Ranges = request.Ranges[:0]
			bytes, next := s.claim(&request, *cursor, room)
			*cursor = next
			if bytes == 0 { // perhaps only because faults were faster
				_, missing = s.e.pages.nextMissing(next)
				continue
			}
			s.pace.asked(int64(bytes), s.e.now())
			if !s.ask(l, &request, bytes) {
				return false
			}
			continue
		}
		switch {
		case l.asked.Load() > 0:
			if !s.take(l) {
				return false
			}
		case !missing:
			s.end(s.answeredAll())
			<-s.ctx.Done() // the lane stays open until then: its end would look like its loss
		default:
			paid.Reset(time.Duration(wait))
			select {
			case <-paid.C:
			case <-s.e.budget.changed:
			case <-s.ctx.Done():
			}
		}
	}
	return true
}

// awaitStart waits for StartSweep or the end of the session, and asks meanwhile for what Foresee names. It says false when the
// lane is over.
func (s *session) awaitStart(l *lane, request *pagewire.Request) bool {
	for {
		select {
		case f := <-s.e.foreseen:
			if !s.early(l, request, f) {
				return false
			}
		case <-s.e.sweeping:
			return true
		case <-s.ctx.Done():
			return true
		}
	}
}

// early asks for all that is foreseen and missing, and takes the answers, before the sweep. The source answers nothing
// until it has stopped the VM: a message that waited for the answer to the one before would cost a round trip of the
// downtime.
func (s *session) early(l *lane, request *pagewire.Request, foreseen []Stretch) bool {
	request.Ranges = request.Ranges[:0]
	asked := uint64(0)
	send := func() bool {
		s.pace.sent += int64(asked) // and measures nothing: how long the VM still runs says nothing of the network
		ok := asked == 0 || s.ask(l, request, asked)
		request.Ranges, asked = request.Ranges[:0], 0
		return ok
	}
	for _, f := range foreseen {
		b := &s.e.blocks[f.Block]
		p := b.first + f.Offset>>b.shift
		for end := min(b.end(), p+(f.Bytes+b.PageSize-1)>>b.shift); p < end; {
			n := s.want(request, b, p, min(end-p, max(1, (foreseenBytes-asked)>>b.shift)))
			asked, p = asked+n<<b.shift, p+max(1, n) // 0: a fault was faster
			if (asked >= foreseenBytes || len(request.Ranges) == sweepRanges) && !send() {
				return false
			}
		}
	}
	if !send() {
		return false
	}
	for l.asked.Load() > 0 {
		if !s.take(l) {
			return false
		}
	}
	return true
}

// ask sends the request. It says false when that ended the session.
func (s *session) ask(l *lane, request *pagewire.Request, bytes uint64) bool {
	err := l.ask(request, bytes)
	s.end(err)
	return err == nil
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
	firsts  []span // what comes before all else
	begin   uint64 // of firsts
}

// A span is pages from first to end, which is not one of them.
type span struct{ first, end uint64 }

// firsts are the blocks that are First.
func (e *Engine) firsts() (spans []span) {
	for i := range e.blocks {
		if b := &e.blocks[i]; b.First {
			spans = append(spans, span{b.first, b.end()})
		}
	}
	return spans
}

// first returns a place in a block that is First; nil where all of those was asked for.
func (f *fronts) first(p *pages) *uint64 {
	for ; len(f.firsts) > 0; f.firsts = f.firsts[1:] {
		if at, ok := p.nextMissing(f.firsts[0].first); ok && at >= f.firsts[0].first && at < f.firsts[0].end {
			f.begin = at
			return &f.begin
		}
	}
	return nil
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
		n := s.want(request, b, p, min(most, b.end()-p))
		cursor = p + max(1, n) // a fault may have been faster
		bytes += n << b.shift
	}
	return bytes, cursor
}

// want claims pages of b from p on for the sweep, most at most, as far as they are missing, and puts them into the request.
// It returns how many they are.
func (s *session) want(request *pagewire.Request, b *block, p, most uint64) uint64 {
	n := s.e.pages.claimSweep(p, most)
	if n == 0 {
		return 0
	}
	s.e.at("swept", p)
	request.Ranges = append(request.Ranges,
		pagewire.Range{Block: uint32(b.index), Offset: (p - b.first) << b.shift, Length: uint32(n << b.shift)})
	return n
}

// faultsWait says whether threads wait for pages that are on their way.
func (s *session) faultsWait() bool { return s.e.pending.count.Load() > 0 }

// answeredAll makes sure that the answers to all that the sweep has asked for answered it.
func (s *session) answeredAll() error {
	if p, ok := s.e.pages.firstSwept(); ok {
		b := s.e.holder(p)
		return protocolError("it answered something else in place of the page at %#x of block %d (%s)", (p-b.first)<<b.shift, b.index, b.ID)
	}
	return nil
}
