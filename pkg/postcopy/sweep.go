// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"sync/atomic"
	"time"

	"github.com/migrated-vm/migrated/pkg/pagewire"
)

// sweep fetches, on a bulk lane, the pages that no fault has asked for, beginning where faults happen, until none is
// missing. One goroutine of each lane asks and installs, because a reply makes room for the next run. Faults come
// first: pace.go says how much the sweep may have in flight; that is less while a fault waits. budget.go says when the
// sweep may go on if there is a limit, and bulk.go what several lanes share.
func (s *session) sweep(l *lane, first bool) {
	defer close(l.ended)
	defer l.reply.Release()
	if s.fill(l, first) {
		_ = l.stream.CloseSend() // the source ends the lane
		for s.take(l) {
		}
	}
}

// fill asks and installs until the session is over; the first lane begins. It returns false when the lane is over, too.
func (s *session) fill(l *lane, first bool) bool {
	request := pagewire.Request{Ranges: make([]pagewire.Range, 0, sweepRanges)}
	if first {
		if !s.awaitStart(l, &request) {
			return false
		}
		s.openAll()
	}
	request.Holes = true // not before: the VM stands still while it waits for what Foresee names
	paid := time.NewTimer(0)
	defer paid.Stop()
	for s.ctx.Err() == nil {
		bytes, wait, end := s.next(l, &request)
		switch {
		case bytes > 0:
			if !s.ask(l, &request, bytes) {
				return false
			}
		case l.asked.Load() > 0:
			if !s.take(l) {
				return false
			}
		case end:
			s.end(s.answeredAll())
			<-s.ctx.Done() // the lane stays open until then, because its end would look like a loss
		default:
			s.idle(l, paid, wait)
		}
	}
	return true
}

// awaitStart waits for StartSweep or the end of the session, and asks meanwhile for what Foresee names. It returns
// false when the lane is over.
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
// until it has stopped the VM. If a message waited for the answer to the one before, that would add a round trip to the
// downtime.
func (s *session) early(l *lane, request *pagewire.Request, foreseen []Range) bool {
	request.Ranges = request.Ranges[:0]
	asked := uint64(0)
	send := func() bool {
		if asked > 0 { // nothing is measured: how long the VM still runs says nothing about the network
			s.bulk.mu.Lock()
			s.bulk.pace.sent += int64(asked)
			s.bulk.inFlight += int64(asked)
			s.bulk.mu.Unlock()
			l.bulk.owes = append(l.bulk.owes, request.Ranges...)
		}
		ok := asked == 0 || s.ask(l, request, asked)
		request.Ranges, asked = request.Ranges[:0], 0
		return ok
	}
	for _, f := range foreseen {
		b := &s.e.blocks[f.Block]
		p := b.first + f.Offset>>b.shift
		for end := min(b.end(), p+(f.Bytes+b.PageSize-1)>>b.shift); p < end; {
			n := s.want(request, b, p, min(end-p, max(1, (foreseenBytes-asked)>>b.shift)))
			asked, p = asked+n<<b.shift, p+max(1, n) // n is 0: a fault was faster
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

// hints tell the sweep where threads fault. Threads share them. An entry is a page + 1; 0: the sweep has taken it.
type hints struct {
	after [sweepFronts]atomic.Uint64 // the pages after the last faults of each thread
	near  [nearFaults]atomic.Uint64  // the pages of the last faults that belong to no stream
	count atomic.Uint32              // of these
}

func (h *hints) set(thread uint32, page uint64) { h.after[thread%sweepFronts].Store(page + 1) }

// faulted records a fault of a thread that belongs to no stream.
func (h *hints) faulted(thread uint32, page uint64) {
	h.set(thread, page+1)
	h.near[h.count.Add(1)%nearFaults].Store(page + 1)
}

// fronts are the places from which the sweep goes on, in turns: where threads fault, one for each thread. With a single
// place, and two threads that go through memory, the sweep would leave each thread as soon as the other has faulted.
//
// On a short path, every second turn takes memory near a fault without order. The latest fault comes first, and the
// memory behind it before the memory in front of it. Kernels and programs use what lies together: of the faults of a
// Linux guest in the first second that it runs, three in five are within 128 KiB of an earlier one, on either side.
type fronts struct {
	cursors [sweepFronts]uint64
	open    [sweepFronts]bool
	last    int
	near    []span // the last one comes next
	isNear  bool   // the last turn was near's
	firsts  []span // what comes before all else
}

// A span is the pages from first on, up to but without end.
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

// first returns a place in a block that is First; nil if all of these blocks was asked for.
func (f *fronts) first(p *pages) *uint64 {
	for ; len(f.firsts) > 0; f.firsts = f.firsts[1:] {
		span := &f.firsts[0]
		if at, ok := p.nextMissing(span.first); ok && at >= span.first && at < span.end {
			span.first = at // nothing before at becomes missing again in this session, but see without
			return &span.first
		}
	}
	return nil
}

// next returns the place whose turn it is. Before the first fault that is the beginning of memory.
func (f *fronts) next(h *hints) *uint64 {
	for i := range f.cursors {
		if page := h.after[i].Swap(0); page != 0 {
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

// takeNear takes over what hints say of faults without order.
func (s *session) takeNear() {
	f, h := &s.bulk.fronts, &s.e.hints
	newest := h.count.Load()
	for i := range uint32(nearFaults) {
		page := h.near[(newest+1+i)%nearFaults].Swap(0)
		if page == 0 {
			continue
		}
		p := page - 1
		b := s.e.holder(p)
		n := uint64(nearBytes) >> b.shift // none where a page is as large as that
		f.near = append(f.near, span{max(b.first, p-min(p, n)), p}, span{p, min(p+n, b.end())})
	}
	if most := 2 * nearFaults; len(f.near) > most {
		f.near = append(f.near[:0], f.near[len(f.near)-most:]...)
	}
}

// claimNear claims missing pages near faults without order, of so many bytes at most, and puts them into the request.
func (s *session) claimNear(request *pagewire.Request, room uint64) (bytes uint64) {
	s.takeNear()
	for f := &s.bulk.fronts; len(f.near) > 0; f.near = f.near[:len(f.near)-1] {
		span := &f.near[len(f.near)-1]
		for b := s.e.holder(span.first); span.first < span.end; {
			most := min((room-bytes)>>b.shift, span.end-span.first)
			if most == 0 || len(request.Ranges) == sweepRanges {
				return bytes
			}
			n := s.want(request, b, span.first, most)
			span.first += max(1, n)
			bytes += n << b.shift
		}
	}
	return bytes
}

// choose claims what is to be asked for next, at most so many bytes or one page, and puts it into the request. It
// returns how many bytes that is. If it is nothing, it says whether something may be missing all the same.
func (s *session) choose(request *pagewire.Request, room uint64) (bytes uint64, missing bool) {
	f := &s.bulk.fronts
	request.Ranges = request.Ranges[:0]
	cursor := f.first(s.e.pages)
	if cursor == nil {
		if f.isNear = !f.isNear && s.bulk.pace.lowestTrip() <= nearTrip; f.isNear {
			bytes = s.claimNear(request, room)
		}
		cursor = f.next(&s.e.hints)
	}
	if bytes > room/2 { // otherwise there is too little left for a message of its own
		return bytes, true
	}
	more, next := s.claim(request, *cursor, room-bytes)
	if bytes, *cursor = bytes+more, next; bytes > 0 {
		return bytes, true
	}
	_, missing = s.e.pages.nextMissing(next) // perhaps only because faults were faster
	return 0, missing
}

// claim claims missing pages from cursor on, at most so many bytes or one page, and puts them into the request. Where
// faults have brought pages in between, it takes several ranges, because a message for each would cost more than its
// pages. It returns how many bytes it has claimed, and where to go on.
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

// want claims up to most pages of b from p on for the sweep, as far as they are missing, and puts them into the
// request. It returns how many it has claimed.
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

// answeredAll makes sure that the source has answered for every page that the sweep has asked for.
func (s *session) answeredAll() error {
	if p, ok := s.e.pages.firstSwept(); ok {
		b := s.e.holder(p)
		return protocolError("it answered something else in place of the page at %#x of block %d (%s)",
			(p-b.first)<<b.shift, b.index, b.ID)
	}
	return nil
}
