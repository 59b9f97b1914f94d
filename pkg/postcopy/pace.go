// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"sync/atomic"
	"time"
)

// pace says how much the sweep may have asked for and not got.
//
// Demand lanes have connections of their own, but all of them share one link. What the sweep has in flight beyond what
// the link holds waits in a queue in front of it, and a page that a thread waits for comes behind that: 4 MiB are 33 ms
// of 1 Gbit/s. With less in flight than the link holds it idles. So, as BBR does it for a sender (Cardwell et al., ACM
// Queue 14/5, 2016), both are measured: the rate at which data comes, the highest of late, and the round trip, the
// lowest there was. Their product is what the link holds; a queue keeps it busy while one run is answered, a short one
// while a thread waits for a page.
//
//	sweep ── asked ──►  in flight: at most rate × round trip + queue  ──► answered
//
// Where a limit is set (budget.go), that is the rate, if it is lower: more in flight than it lets come would only come at once.
//
// The sweep's goroutine owns it.
type pace struct {
	budget *budget

	window, run         int64 // as a rule: bytes in flight, and to ask for at a time
	busyWindow, busyRun int64 // while a thread waits

	sent    int64 // bytes asked for since the session began
	probing bool  // a probe is under way
	end     int64 // it ends when so much came
	began   int64 // ns

	came, data         int64                // bytes answered, and those of them that were not zero
	lastCame, lastData int64                // when the last probe ended
	last, lastBegan    int64                // ns, when that was, and when it had begun
	rates              [pacedProbes]float64 // bytes a ns of the last probes
	next               int
	share              float64 // of what comes, that is not zero
	trip               int64   // ns: the lowest round trip of the bulk lane
	best               float64 // bytes a ns: the rate that later ones must exceed to be a rise
	flat               int     // how many probes have shown no rise
}

func newPace(b *budget) *pace {
	return &pace{
		budget: b, share: 1,
		window: firstWindow, run: firstWindow / 2, busyWindow: 2 * leastRun, busyRun: leastRun,
	}
}

// asked says that so many bytes were asked for at now.
func (p *pace) asked(bytes, now int64) {
	p.sent += bytes
	if !p.probing {
		p.end, p.began = p.sent, now
		p.probing = true
	}
}

// answered says that so many bytes were answered for at now, how many of these were not zero, and as how many those were
// carried. trip is the fastest answer to a fault so far of those that were the first to ask for their page, in ns, 0: none yet.
func (p *pace) answered(bytes, data, carried, now, trip int64) {
	p.budget.spend(carried, now)
	p.budget.weigh(bytes, carried)
	p.came += bytes
	p.data += data
	p.share += (float64(data)/float64(max(1, bytes)) - p.share) / 8
	if !p.probing || p.came < p.end {
		return
	}
	took := max(1, now-p.began)
	if p.trip == 0 || took < p.trip {
		p.trip = took
	}
	if trip == 0 || p.trip < trip {
		trip = p.trip
	}
	// Since the last probe ended, which is a round trip at least; or since it began, if that is longer: what waited behind a
	// packet that was lost comes all at once. Zeros take no time on the link: only what was mostly data says what it can carry.
	got, of := p.data-p.lastData, p.came-p.lastCame
	if p.last != 0 && 2*got >= of {
		p.rated(float64(got) / float64(max(1, now-p.last, p.began-p.lastBegan)))
	}
	p.last, p.lastBegan, p.lastCame, p.lastData = now, p.began, p.came, p.data
	p.set(trip)
	p.probing = false
}

// rated takes in a rate, in bytes a ns.
func (p *pace) rated(rate float64) {
	p.rates[p.next%pacedProbes] = rate
	p.next++
	p.flat++
	if rate > 1.25*p.best {
		p.best, p.flat = rate, 0
	}
}

// set makes windows of the rate and a round trip.
func (p *pace) set(trip int64) {
	rate := 0.0
	for _, r := range p.rates {
		rate = max(rate, r)
	}
	if rate == 0 { // zeros up to now: they may come as fast as they can
		most := p.budget.most() // data may come at once
		p.run = min(2*p.run, sweepRun, most/2)
		p.window = min(2*p.window, sweepWindow, most)
		return
	}
	least := int64(0)
	if p.flat < 3 { // the link has not been full yet: what it can carry shows only when more is sent
		rate *= 2
		least = firstWindow
	}
	// In bytes of RAM, some of which will be zero.
	rate /= max(p.share, leastShare)
	idle, busy := idleQueue, max(busyQueue, time.Duration(trip)/4)
	if limit := p.budget.rate(); limit < rate {
		rate, idle, busy, least = limit, 0, 0, 0 // it is meant to idle
	}
	in := func(t time.Duration) int64 { return int64(rate * float64(t.Nanoseconds())) }
	holds := in(time.Duration(trip))
	run := min(max(leastRun, in(runTime)), sweepRun)
	busyRun := max(leastRun, run/2)
	p.run = run
	p.window = min(max(least, holds+max(2*run, in(idle))), sweepWindow)
	p.busyRun = busyRun
	p.busyWindow = min(holds+max(2*busyRun, in(busy)), sweepWindow)
}

// room says how many bytes the sweep may ask for now, with so many in flight; 0: none.
func (p *pace) room(inFlight int64, threadWaits bool) uint64 {
	window, run := p.window, p.run
	if threadWaits {
		window, run = p.busyWindow, p.busyRun
	}
	if inFlight > 0 && inFlight+run > window {
		return 0
	}
	return uint64(run)
}

// fastest is the shortest duration so far, in ns; 0: none.
type fastest struct{ ns atomic.Int64 }

func (f *fastest) add(d time.Duration) {
	for {
		old := f.ns.Load()
		if old != 0 && int64(d) >= old || f.ns.CompareAndSwap(old, max(1, int64(d))) {
			return
		}
	}
}
