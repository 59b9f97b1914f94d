// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"context"
	"errors"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/migrated-vm/migrated/pkg/pagewire"
	"github.com/migrated-vm/migrated/pkg/uffd"
)

// bulk is what the bulk lanes of a session share. There is one lane at first; scale.go says when there are more.
//
//	         ┌─ bulk, under mu ─────────┐
//	lane 0 ─►│ pace: may it ask?        │   each lane's goroutine asks for the next run, of them all, and installs
//	lane 1 ─►│ fronts: which run?       │   what its own lane answers: receiving, unpacking and UFFDIO_COPY of one
//	  ⋮      │ scale: how many lanes?   │   lane are on another processor than those of the next.
//	         └──────────────────────────┘
//
// No lane has a part of memory of its own. A lane that has room takes the next run. So memory is swept in the order in
// which a single lane would sweep it, and no lane is left with more than the others. pace belongs to the path and not
// to a lane: all lanes together have in flight what a single lane would have, and a page that a thread waits for comes
// behind no more than that. Each lane has its share of it, so that a lane with a slow connection does not hold all of
// it.
//
// mu is taken for each run, of 64 KiB and more, and never in the way of a fault.
type bulk struct {
	open func(context.Context) (Lane, error) // opens another lane; nil: there is one only

	mu       sync.Mutex
	pace     *pace
	fronts   fronts
	missing  bool     // something may be missing
	aside    []uint64 // pages that are asked for when nothing else is missing, see setAside
	lanes    []*lane  // open now
	lost     []*lane  // open no longer
	inFlight int64    // bytes asked for on all lanes and not answered
	scale    scale
	spare    []*uffd.CopyRecord // of lost lanes, whose goroutines copy nothing any more
	opening  bool               // a lane
	closed   bool               // none is opened any more
}

// bulkLane is what a lane of the sweep has in addition. Its goroutine owns all fields but those marked 'under mu'.
type bulkLane struct {
	owes  []pagewire.Range // asked for and not answered, in order
	woken chan struct{}    // there may be room for the next run; holds one
	idle  bool             // under mu: the lane waits for woken
}

// newBulk makes a lane of the sweep. The caller holds mu, or is the only user.
func (s *session) newBulk(stream Lane) *lane {
	c, k := &s.e.counters, &s.bulk
	name := "bulk lane"
	if len(k.lanes) > 0 {
		name = "another bulk lane"
	}
	var record *uffd.CopyRecord
	if n := len(k.spare); n > 0 {
		record, k.spare = k.spare[n-1], k.spare[:n-1]
	} else { // all records that were ever taken belong to open lanes
		record = &s.e.bulkCopies()[len(k.lanes)]
	}
	l := newLane(name, stream, &c.bulkBytes, &c.bulkPages, record)
	l.bulk = &bulkLane{woken: make(chan struct{}, 1)}
	k.lanes = append(k.lanes, l)
	return l
}

// mostLanes is how many bulk lanes may be of use: one for each processor, but no more than there are copy records for.
func (e *Engine) mostLanes() int {
	return min(mostBulkLanes, runtime.NumCPU(), len(e.bulkCopies()))
}

// next claims what a lane is to ask for now and puts it into the request. If that is nothing, next says how long the
// budget wants the lane to wait, and whether the sweep has come to its end.
func (s *session) next(l *lane, request *pagewire.Request) (bytes uint64, wait int64, end bool) {
	k := &s.bulk
	k.mu.Lock()
	defer k.mu.Unlock()
	l.bulk.idle = false
	wait = s.e.budget.wait(s.e.now())
	room, threadWaits := uint64(0), s.faultsWait()
	if wait == 0 && k.uses(l) {
		room = k.room(l, threadWaits)
	}
	request.Piece = 0
	if threadWaits {
		request.Piece = uint32(k.pace.piece)
	}
	for room > 0 && bytes == 0 && (k.missing || s.bringBack()) {
		bytes, k.missing = s.choose(request, room)
	}
	if bytes > 0 {
		k.pace.asked(int64(bytes), s.e.now())
		k.inFlight += int64(bytes)
		l.bulk.owes = append(l.bulk.owes, request.Ranges...)
	}
	l.bulk.idle = bytes == 0 && l.asked.Load() == 0
	if (k.missing || len(k.aside) > 0) && wait == 0 {
		k.wakeNext(s.faultsWait())
	}
	return bytes, wait, !k.missing && len(k.aside) == 0 && k.inFlight == 0
}

// uses says whether the sweep uses a lane now. It uses the first lanes of the list; the others wait to be used again.
func (k *bulk) uses(l *lane) bool { return slices.Index(k.lanes, l) < k.scale.lanes }

// room is how many bytes a lane may ask for. A lane may exceed its share by a run. If the shares were rounded down to
// whole runs, less would be in flight than pace found to be right. pace would take that for a slower path, again and
// again.
func (k *bulk) room(l *lane, threadWaits bool) uint64 {
	if k.scale.lanes > 1 && l.asked.Load() > 0 && l.asked.Load() >= k.pace.most(threadWaits)/int64(k.scale.lanes) {
		return 0
	}
	return k.pace.room(k.inFlight, threadWaits)
}

// wakeNext wakes a lane that waits, if there is room for what it would ask for. That one wakes the next.
func (k *bulk) wakeNext(threadWaits bool) {
	if k.pace.room(k.inFlight, threadWaits) == 0 {
		return
	}
	for _, l := range k.lanes[:min(k.scale.lanes, len(k.lanes))] {
		if l.bulk.idle {
			l.bulk.wake()
			return
		}
	}
}

func (k *bulk) wakeAll() {
	for _, l := range k.lanes {
		l.bulk.wake()
	}
}

func (b *bulkLane) wake() {
	select {
	case b.woken <- struct{}{}:
	default: // woken already
	}
}

// answered settles what was asked for on a lane.
func (s *session) answered(l *lane, bytes, data, carried int64) {
	l.bulk.settle(uint64(bytes))
	k := &s.bulk
	k.mu.Lock()
	defer k.mu.Unlock()
	k.inFlight -= bytes
	now := s.e.now()
	k.pace.answered(bytes, data, carried, now, s.e.fastest.take())
	switch {
	case s.e.budget.wait(now) > 0: // the rate is then that of the limit, not of the lanes
		k.scale.restart(now)
	case !k.opening && s.e.started.Load() && k.scale.came(now, k.pace.lowestTrip(), bytes, data, s.e.latency.total):
		s.rescale(now)
	}
	s.e.counters.lanes(k.scale.lanes)
}

// settle forgets what was answered, in the order in which it was asked for. This daemon's page server answers in that
// order. If a server answers in another order and a lane is lost, some pages may be left that nobody asks for again.
// Then the session ends with an error (answeredAll), and the next session asks for them.
func (b *bulkLane) settle(bytes uint64) {
	done := 0
	for ; done < len(b.owes) && bytes > 0; done++ {
		r := &b.owes[done]
		if n := min(bytes, uint64(r.Length)); n < uint64(r.Length) {
			r.Offset, r.Length = r.Offset+n, r.Length-uint32(n)
			break
		}
		bytes -= uint64(r.Length)
	}
	b.owes = append(b.owes[:0], b.owes[done:]...)
}

// rescale brings the number of lanes to what scale wants; at most one lane is lacking. The caller holds mu.
func (s *session) rescale(now int64) {
	k := &s.bulk
	if k.scale.lanes <= len(k.lanes) {
		k.wakeAll()
		return
	}
	k.scale.lanes = len(k.lanes) // until it is open
	if k.closed || k.open == nil {
		k.scale.refused(now)
		return
	}
	k.opening = true
	s.asking.Go(s.openBulk)
}

// openAll opens all lanes at once, where a test says how many there are to be.
func (s *session) openAll() {
	k := &s.bulk
	k.mu.Lock()
	defer k.mu.Unlock()
	for range min(s.e.bulkLanes, mostBulkLanes, len(s.e.bulkCopies())) - 1 {
		if k.open != nil && !k.closed {
			s.asking.Go(s.openBulk)
		}
	}
}

// openBulk opens another lane. If that fails, the session goes on with the lanes that it has.
func (s *session) openBulk() {
	s.e.at("opening", 0)
	stream, err := s.bulk.open(s.ctx)
	k := &s.bulk
	k.mu.Lock()
	defer k.mu.Unlock()
	k.opening = false
	switch {
	case err != nil:
		k.scale.refused(s.e.now())
	case k.closed:
		stream.Abort()
	default:
		k.scale.lanes++
		s.e.counters.lanes(k.scale.lanes)
		go s.sweep(s.newBulk(stream), false)
	}
}

// lose deals with the loss of a lane, which the lane's receiver has noticed. The loss of a demand lane, or of the
// sweep's last lane, ends the session. After the loss of any other lane of the sweep the session goes on, and asks
// again for what was asked for on that lane.
func (s *session) lose(l *lane, err error) {
	s.noteUnread(l, err)
	if l.bulk == nil || errors.Is(err, pagewire.ErrMalformed) || !s.without(l) {
		s.end(l.lost(err))
	}
}

// without drops a lane of the sweep. It returns false if that is the last one.
func (s *session) without(l *lane) bool {
	k := &s.bulk
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.lanes) == 1 || s.ctx.Err() != nil {
		return false
	}
	k.lanes = slices.DeleteFunc(k.lanes, func(other *lane) bool { return other == l })
	k.lost, k.spare = append(k.lost, l), append(k.spare, l.record)
	for _, r := range l.bulk.owes {
		b := &s.e.blocks[r.Block]
		p := b.first + r.Offset>>b.shift
		for end := p + uint64(r.Length)>>b.shift; p < end; p++ {
			s.e.pages.swap(p, swept, missing)
		}
	}
	lost := l.asked.Swap(0)
	l.bulk.owes = nil
	k.inFlight -= lost
	k.pace.forget(lost)
	k.missing = true
	s.setAside()
	k.fronts.firsts = s.e.firsts()
	k.scale.lost(len(k.lanes), s.e.now())
	s.e.counters.lanes(k.scale.lanes)
	s.e.counters.lanesLost.Add(1)
	k.wakeAll()
	return true
}

// close prevents that further lanes are opened.
func (k *bulk) close() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.closed = true
}

func (k *bulk) all() []*lane {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Concat(k.lanes, k.lost)
}

// idle waits until a lane may have something to ask for. If the lane waits for the budget, it waits for as long as the
// budget says.
func (s *session) idle(l *lane, paid *time.Timer, wait int64) {
	var due <-chan time.Time
	if wait > 0 {
		paid.Reset(time.Duration(wait))
		due = paid.C
	}
	select {
	case <-due:
	case <-l.bulk.woken:
	case <-s.e.budget.changed: // only one lane hears of the change
		s.bulk.mu.Lock()
		s.bulk.wakeAll()
		s.bulk.mu.Unlock()
	case <-s.ctx.Done():
	}
}
