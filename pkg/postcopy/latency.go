// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"math/bits"
	"sync/atomic"
	"time"
)

// histogram counts durations in buckets whose width is at most 1/16 of what they hold. Any number of
// goroutines may add and read at once.
type histogram struct {
	counts [buckets]atomic.Uint64
	max    atomic.Int64
}

const (
	subBits = 4                             // 16 buckets for each power of two
	buckets = (64 - subBits + 1) << subBits // of all durations
)

func (h *histogram) add(d time.Duration) {
	v := max(0, int64(d))
	h.counts[bucket(uint64(v))].Add(1)
	for {
		old := h.max.Load()
		if v <= old || h.max.CompareAndSwap(old, v) {
			return
		}
	}
}

// bucket returns the bucket of v: v itself below 16, otherwise the exponent and the four bits after the leading one.
func bucket(v uint64) int {
	if v < 1<<subBits {
		return int(v)
	}
	shift := bits.Len64(v) - 1 - subBits
	return (shift+1)<<subBits | int(v>>shift&(1<<subBits-1))
}

// upper is the largest value of a bucket.
func upper(bucket int) uint64 {
	if bucket < 1<<subBits {
		return uint64(bucket)
	}
	shift := bucket>>subBits - 1
	return (1<<subBits|uint64(bucket)&(1<<subBits-1)+1)<<shift - 1
}

// middle is the value in the middle of a bucket. It differs by at most 1/32 from each value that the bucket counts.
func middle(bucket int) uint64 {
	least := uint64(0)
	if bucket > 0 {
		least = upper(bucket-1) + 1
	}
	return least + (upper(bucket)-least)/2
}

// total is how many durations there are, and their sum in ns, to 1/32. The sum is made of the buckets, so that adding a
// duration writes one counter less.
func (h *histogram) total() (n uint64, sum int64) {
	for i := range h.counts {
		if here := h.counts[i].Load(); here > 0 {
			n, sum = n+here, sum+int64(middle(i)*here)
		}
	}
	return n, sum
}

// quantile returns a value that the share q of all durations does not exceed, 0 if there are none.
func (h *histogram) quantile(q float64) time.Duration {
	total, _ := h.total()
	if total == 0 {
		return 0
	}
	rank, seen := uint64(q*float64(total-1))+1, uint64(0)
	for i := range h.counts {
		if seen += h.counts[i].Load(); seen >= rank {
			return min(time.Duration(upper(i)), time.Duration(h.max.Load()))
		}
	}
	return time.Duration(h.max.Load()) // some durations were added meanwhile
}

// pending remembers when the fault of a page was read, for faults whose page is on its way: a hash table of
// fixed size without locks. A fault that finds no slot is not timed.
type pending struct {
	count atomic.Int64 // of used slots: nothing needs to be looked up when there are none
	slots [pendingSlots]struct {
		page atomic.Uint64 // page number + 1, 0: free, reserved: being filled
		when atomic.Int64
		trip atomic.Bool // nobody had asked for the page before, so its time is at least a whole round trip
	}
}

const reserved = ^uint64(0)

// start remembers a fault on page p, read at now; trip says that nobody had asked for the page before. A page that is
// in the table already keeps its time: it waited through a lost lane.
func (t *pending) start(p uint64, now int64, trip bool) {
	if t.find(p) >= 0 {
		return
	}
	for i := range uint64(pendingProbes) {
		s := &t.slots[(p+i)%pendingSlots]
		if s.page.Load() == 0 && s.page.CompareAndSwap(0, reserved) {
			s.when.Store(now)
			s.trip.Store(trip)
			t.count.Add(1)
			s.page.Store(p + 1)
			return
		}
	}
}

func (t *pending) find(p uint64) int {
	if t.count.Load() == 0 {
		return -1
	}
	for i := range uint64(pendingProbes) {
		if slot := (p + i) % pendingSlots; t.slots[slot].page.Load() == p+1 {
			return int(slot)
		}
	}
	return -1
}

// end forgets page p. It returns when its fault was read, if that is known, and the trip that start was given.
func (t *pending) end(p uint64) (when int64, trip, ok bool) {
	i := t.find(p)
	if i < 0 {
		return 0, false, false
	}
	s := &t.slots[i]
	when, trip = s.when.Load(), s.trip.Load()
	if !s.page.CompareAndSwap(p+1, 0) {
		return 0, false, false
	}
	t.count.Add(-1)
	return when, trip, true
}

// endAll forgets n pages from page p on.
func (t *pending) endAll(p, n uint64) {
	if t.count.Load() == 0 {
		return
	}
	for i := range t.slots {
		if page := t.slots[i].page.Load(); page != 0 && page != reserved && page-1-p < n {
			t.end(page - 1)
		}
	}
}
