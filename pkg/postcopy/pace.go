// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"slices"
	"sync/atomic"
	"time"

	"github.com/migrated-vm/migrated/pkg/pagewire"
)

// pace limits how much the sweep may have in flight.
//
// Demand lanes have connections of their own, but all of them share one link. If the sweep has more in flight than the
// link holds, the rest waits in a queue in front of the link, and a page that a thread waits for comes behind that
// queue: 4 MiB are 33 ms of 1 Gbit/s. If it has less in flight than the link holds, the link idles. So two things are
// measured, as BBR does it for a sender (Cardwell et al., ACM Queue 14/5, 2016): the highest recent rate at which data
// comes, and the lowest round trip. Their product is what the link holds. A queue keeps the link busy while one run is
// answered; it is short while a thread waits for a page.
//
//	sweep ── asked ──►  in flight: at most rate × round trip + queue  ──► answered
//
// A bandwidth limit (budget.go) below the rate takes its place: if more were in flight than the limit lets come, it
// would only come all at once.
//
// The path may change, for example when it is rerouted. If the round trip then becomes longer, the earlier measurement
// would stay too short: too little is in flight, and answers come late, which looks like a slow link. So the round trip
// is measured anew after a while, with nothing else in flight, as BBR does it (ProbeRTT). After that the rate may rise
// again.
//
// There is one pace for all bulk lanes together, under their lock (bulk.go).
type pace struct {
	budget *budget

	window, run         int64 // while no thread waits: bytes in flight, and in one request
	busyWindow, busyRun int64 // while a thread waits
	piece               int64 // what one reply then carries at most

	sent    int64 // bytes asked for since the session began
	probing bool  // a probe is under way
	end     int64 // the value of came at which the probe ends
	began   int64 // ns

	came, data         int64                // bytes answered, and those of them that were not zero
	lastCame, lastData int64                // when the last probe ended
	last, lastBegan    int64                // ns, when that was, and when it had begun
	rates              [pacedProbes]float64 // bytes a ns of the last probes
	next               int
	share              float64 // of what comes, how much is not zero
	tripAt             int64   // ns, when a round trip was measured last with nothing else in flight
	trip, tripBefore   int64   // ns: the lowest round trips of the bulk lane since then, and in the period before; 0: none
	fast, fastBefore   int64   // the same for answers to faults
	grow               bool    // for one probe a little more is in flight: the link may carry more than it did
	alone              bool    // nothing else was in flight when the probe began
	draining           bool    // nothing is asked for until nothing is in flight
	best               float64 // bytes a ns: the rate that later ones must exceed to be a rise
	flat               int     // how many probes have shown no rise
}

func newPace(b *budget) *pace {
	return &pace{
		budget: b, share: 1,
		window: firstWindow, run: firstWindow / 2, busyWindow: 2 * leastRun, busyRun: leastRun, piece: pagewire.LeastPiece,
	}
}

// asked records a request for bytes at now.
func (p *pace) asked(bytes, now int64) {
	alone := p.came == p.sent
	p.sent += bytes
	if !p.probing {
		p.alone = alone
		p.end, p.began = p.sent, now
		p.probing = true
	}
}

// answered says that so many bytes were answered for at now. data of them were not zero, and these crossed the network
// as carried bytes. fast is the time, in ns, of the fastest answer since the last call to a fault that was the first to
// ask for its page; 0: there was none.
func (p *pace) answered(bytes, data, carried, now, fast int64) {
	p.budget.spend(carried, now)
	p.budget.weigh(bytes, carried)
	p.came += bytes
	p.data += data
	p.share += (float64(data)/float64(max(1, bytes)) - p.share) / 8
	p.fast = lowest(p.fast, fast)
	if !p.probing || p.came < p.end {
		return
	}
	p.measured(max(1, now-p.began), now)
	// The bytes count over the time between the ends of the last two probes, which is a round trip at least, or between
	// their beginnings, if that is longer: what waited behind a lost packet comes all at once. Zeros take no time on the
	// link, so only a probe that was mostly data says what the link can carry.
	got, of := p.data-p.lastData, p.came-p.lastCame
	if p.last != 0 && 2*got >= of {
		p.rated(float64(got) / float64(max(1, now-p.last, p.began-p.lastBegan)))
	}
	p.last, p.lastBegan, p.lastCame, p.lastData = now, p.began, p.came, p.data
	p.set(p.lowestTrip())
	p.probing = false
	p.draining = p.next > 0 && now-p.tripAt > max(tripLife.Nanoseconds(), tripShare*p.lowestTrip())
}

// measured takes in a round trip. If it was measured alone, it begins a new period. Of the earlier periods only the
// last one is remembered, because the new round trip may itself have been held up, for example by a busy processor.
func (p *pace) measured(took, now int64) {
	if !p.alone {
		p.trip = lowest(p.trip, took)
		return
	}
	before := p.lowestTrip()
	p.tripBefore, p.trip, p.tripAt = p.trip, took, now
	p.fastBefore, p.fast = p.fast, 0
	p.grow = true
	if p.lowestTrip() > 2*before && before != 0 { // the latest rates say how much was in flight, and little about the link
		p.best, p.flat = 0, 0
	}
}

// lowestTrip is the lowest round trip of this period and the one before it; 0: nothing was measured.
func (p *pace) lowestTrip() int64 {
	return lowest(lowest(p.trip, p.tripBefore), lowest(p.fast, p.fastBefore))
}

// lowest is the lower of two times; 0 stands for none.
func lowest(a, b int64) int64 {
	if a == 0 || b == 0 {
		return max(a, b)
	}
	return min(a, b)
}

// rated records the rate of a probe, in bytes a ns.
func (p *pace) rated(rate float64) {
	p.rates[p.next%pacedProbes] = rate
	p.next++
	p.flat++
	if rate > 1.25*p.best {
		p.best, p.flat = rate, 0
	}
}

// set computes the windows from the rate and a round trip.
func (p *pace) set(trip int64) {
	rate := slices.Max(p.rates[:])
	if rate == 0 { // only zeros came up to now: they may come as fast as they can
		most := p.budget.most() // data may come at once
		p.run = min(2*p.run, sweepRun, most/2)
		p.window = min(2*p.window, zeroWindow, most)
		return
	}
	least := int64(0)
	if p.grow {
		rate, p.grow = 1.25*rate, false
	}
	if p.flat < flatProbes { // the link has not been full yet: it shows what it can carry only when more is sent
		rate *= 2
		least = firstWindow
	}
	// In bytes of RAM, some of which will be zero.
	rate /= max(p.share, leastShare)
	half := time.Duration(trip) / 2
	idle, busy := max(idleQueue, half), max(busyQueue, half)
	if limit := p.budget.rate(); limit < rate {
		rate, idle, busy, least = limit, 0, 0, 0 // the link is meant to idle
	}
	in := func(t time.Duration) int64 { return int64(rate * float64(t.Nanoseconds())) }
	holds := in(time.Duration(trip))
	part := min(in(time.Duration(trip)/runsPerTrip), sweepRun)
	run := min(max(leastRun, in(runTime), part), sweepRun)
	busyRun := max(leastRun, run/2, part)
	p.run = run
	p.window = min(max(least, holds+max(2*run, in(idle))), sweepWindow)
	p.busyRun = busyRun
	p.busyWindow = min(holds+max(2*busyRun, in(busy)), sweepWindow)
	p.piece = min(max(pagewire.LeastPiece, in(pieceTime), part), busyRun)
}

// room says how many bytes the sweep may ask for now, with so many in flight; 0: none.
func (p *pace) room(inFlight int64, threadWaits bool) uint64 {
	switch {
	case p.draining && inFlight > 0:
		return 0
	case p.draining:
		return leastRun
	}
	run := p.run
	if threadWaits {
		run = p.busyRun
	}
	if inFlight > 0 && inFlight+run > p.most(threadWaits) {
		return 0
	}
	return uint64(run)
}

// most is how many bytes may be in flight, unless the sweep is draining.
func (p *pace) most(threadWaits bool) int64 {
	if threadWaits {
		return p.busyWindow
	}
	return p.window
}

// forget takes back a request for bytes that will not be answered: their lane was lost.
func (p *pace) forget(bytes int64) {
	p.sent -= bytes
	p.probing = false
}

// fastest is the shortest duration since take was called, in ns; 0: none.
type fastest struct{ ns atomic.Int64 }

func (f *fastest) add(d time.Duration) {
	for {
		old := f.ns.Load()
		if old != 0 && int64(d) >= old || f.ns.CompareAndSwap(old, max(1, int64(d))) {
			return
		}
	}
}

// take returns the shortest duration and forgets it.
func (f *fastest) take() int64 { return f.ns.Swap(0) }
