// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// wireModel is a simulated link. rate is in bytes a ns. trip is how long a request takes on an idle link.
type wireModel struct {
	rate float64
	trip time.Duration
	zero bool    // all pages are zero, so answers take no time on the link
	pack float64 // bytes on the link for a byte of RAM; 0: 1
	lost int     // the number of a run that is late by late, as after a lost packet; later runs do not come before it
	late time.Duration
	now  int64

	arrived []came // what came over the link
	took    int64  // how long the last drive took, in ns
}

// came is so many bytes that came over the link at one time.
type came struct{ at, bytes int64 }

// most returns the most bytes that came within any time of length span.
func (m *wireModel) most(span time.Duration) (most int64) {
	sum, first := int64(0), 0
	for _, a := range m.arrived {
		sum += a.bytes
		for ; a.at-m.arrived[first].at > span.Nanoseconds(); first++ {
			sum -= m.arrived[first].bytes
		}
		most = max(most, sum)
	}
	return most
}

// drive has a sweep fetch so many runs over the link. It returns how much of the time the link was busy, and how long a
// run waited in front of it at most.
func (m *wireModel) drive(p *pace, runs int, waits func(i int) bool) (busy float64, queued time.Duration) {
	type run struct {
		bytes   int64
		arrives int64
	}
	var flying []run
	inFlight, free, working, held, start := int64(0), int64(0), int64(0), int64(0), m.now
	answer := func() {
		r := flying[0]
		flying = flying[1:]
		m.now = max(m.now, r.arrives)
		inFlight -= r.bytes
		data := r.bytes
		if m.zero {
			data = 0
		}
		carried := m.carried(data)
		m.arrived = append(m.arrived, came{m.now, carried})
		p.answered(r.bytes, data, carried, m.now, m.trip.Nanoseconds())
	}
	mayAsk := func() bool { // does what the sweep does, with the model's clock
		for {
			wait := p.budget.wait(m.now)
			if wait == 0 {
				return true
			}
			if len(flying) > 0 && flying[0].arrives <= m.now+wait {
				answer()
			} else {
				m.now += wait
			}
		}
	}
	for i := range runs {
		bytes := uint64(0)
		for mayAsk() {
			if bytes = p.room(inFlight, waits(i)); bytes > 0 {
				break
			}
			answer()
		}
		p.asked(int64(bytes), m.now)
		inFlight += int64(bytes)
		takes := int64(float64(m.carried(int64(bytes))) / m.rate)
		if m.zero {
			takes = 0
		}
		begins := max(m.now+m.trip.Nanoseconds()/2, free)
		if i > runs/2 { // the first half is for learning
			queued = max(queued, time.Duration(begins-m.now-m.trip.Nanoseconds()/2))
		}
		free = begins + takes
		working += takes
		arrives := free + m.trip.Nanoseconds()/2
		if i == m.lost {
			held = arrives + m.late.Nanoseconds()
		}
		flying = append(flying, run{int64(bytes), max(arrives, held)})
	}
	for len(flying) > 0 {
		answer()
	}
	m.took = m.now - start
	return float64(working) / float64(m.took), queued
}

// driveFor is drive for about so long.
func (m *wireModel) driveFor(p *pace, long time.Duration) (busy float64, queued time.Duration) {
	spent, parts := int64(0), 0.0
	for spent < long.Nanoseconds() {
		b, q := m.drive(p, 400, never)
		spent += m.took
		busy, parts, queued = busy+b*float64(m.took), parts+float64(m.took), max(queued, q)
	}
	return busy / parts, queued
}

func (m *wireModel) carried(data int64) int64 {
	if m.pack == 0 {
		return data
	}
	return int64(float64(data) * m.pack)
}

func never(int) bool  { return false }
func always(int) bool { return true }

func TestPaceFillsTheLinkAndNoMore(t *testing.T) {
	for _, m := range []*wireModel{
		{rate: 0.125, trip: 200 * time.Microsecond}, // 1 Gbit/s
		{rate: 0.125, trip: 10 * time.Millisecond},
		{rate: 1.25, trip: 50 * time.Microsecond},
		{rate: 2, trip: 30 * time.Microsecond}, // loopback
	} {
		learnt := func(waits func(int) bool) (busy float64, queued time.Duration) {
			p := newPace(newBudget(0))
			m.drive(p, 400, waits)
			return m.drive(p, 400, waits) // without the first measurement of a round trip
		}
		busy, queued := learnt(never)
		if most := max(4*runTime, 12*max(idleQueue, m.trip/2)/10); busy < 0.9 || queued > most {
			t.Errorf("%v bytes a ns, %v: the link was busy for %.2f of the time, and up to %v waited in front of it",
				m.rate, m.trip, busy, queued)
		}
		busy, queued = learnt(always)
		least := min(0.5, leastRun/(m.rate*float64(m.trip.Nanoseconds())+leastRun))
		if busy < least || queued > 12*max(busyQueue, m.trip/2)/10 {
			t.Errorf("%v bytes a ns, %v, while threads wait: busy for %.2f of the time, want %.2f, and up to %v waited",
				m.rate, m.trip, busy, least, queued)
		}
	}
}

func TestPaceRushesThroughZeros(t *testing.T) {
	p := newPace(newBudget(0))
	data := &wireModel{rate: 0.125, trip: 10 * time.Millisecond}
	data.drive(p, 200, never)
	data.zero = true
	data.drive(p, 200, never)
	if w := p.window; w != zeroWindow && w < sweepWindow {
		t.Errorf("the window is %d bytes after 200 runs of zeros, want %d", w, zeroWindow)
	}
	data.zero = false
	if _, queued := data.drive(p, 400, never); queued > 2*idleQueue {
		t.Errorf("up to %v waited in front of the link when data had come again", queued)
	}
}

// TestPaceOfAClump: after a lost packet everything comes at once. That must not be taken for the rate of the link,
// wherever in a measurement it happens.
func TestPaceOfAClump(t *testing.T) {
	for lost := 1; lost < 60; lost++ {
		p := newPace(newBudget(0))
		m := &wireModel{rate: 0.125, trip: 10 * time.Millisecond}
		m.drive(p, 1000, never)
		before := p.window
		m.lost, m.late = lost, 40*time.Millisecond
		m.drive(p, 100, never) // so few that the clump is still among the last rates
		if most := slices.Max(p.rates[:]); most > 1.1*m.rate || p.window > 11*before/10 {
			t.Errorf("%d: %v is taken for the rate of a link of %v; the window was %d and is %d",
				lost, most, m.rate, before, p.window)
		}
	}
}

// TestPaceOfZerosFromTheBeginning: if memory begins with gigabytes of holes, nothing is known of the link until data
// comes. Then the pace is found soon.
func TestPaceOfZerosFromTheBeginning(t *testing.T) {
	p := newPace(newBudget(0))
	m := &wireModel{rate: 0.125, trip: 200 * time.Microsecond, zero: true}
	m.drive(p, 100, never)
	if w, r := p.window, p.run; w != zeroWindow || r != sweepRun {
		t.Errorf("runs of %d bytes in a window of %d after 100 runs of zeros", r, w)
	}
	m.zero = false
	if busy, queued := m.drive(p, 1000, never); busy < 0.9 || queued > 2*idleQueue {
		t.Errorf("when data came, the link was busy for %.2f of the time, and up to %v waited in front of it", busy, queued)
	}
}

func TestRoomIsNeverLessThanOneRun(t *testing.T) {
	p, now := newPace(newBudget(0)), int64(0)
	for range 10 {
		p.asked(leastRun, now)
		now += int64(time.Hour) // an hour for one run
		p.answered(leastRun, leastRun, leastRun, now, int64(time.Microsecond))
	}
	if p.room(0, true) < leastRun || p.room(0, false) < leastRun {
		t.Error("a slow link stops the sweep")
	}
	if p.room(leastRun+1, true) != 0 {
		t.Error("three runs are in flight over a slow link")
	}
}

// link is what a test changes to.
type link struct {
	rate float64
	trip time.Duration
}

// randomLink returns a link of 160 Mbit/s to 10 Gbit/s and 50 µs to 30 ms.
func randomLink(random *rand.Rand) link {
	between := func(least, most float64) float64 { return least * math.Pow(most/least, random.Float64()) }
	return link{between(0.02, 1.25), time.Duration(between(50, 30_000)) * time.Microsecond}
}

// TestPaceOfAPathThatChanges: three seconds after a path has changed, the link is used as far as it can be, with a
// short queue in front of it, whatever it was before. The links are the same in each run, because what is short was
// found by trying.
func TestPaceOfAPathThatChanges(t *testing.T) {
	var tests [][]link
	corners := []link{
		{0.02, 50 * time.Microsecond}, {0.02, 30 * time.Millisecond},
		{1.25, 50 * time.Microsecond}, {1.25, 30 * time.Millisecond},
	}
	for _, from := range corners {
		for _, to := range corners {
			tests = append(tests, []link{from, to})
		}
	}
	random := rand.New(rand.NewPCG(1, 2))
	for range 100 {
		links := []link{randomLink(random)}
		for range 1 + random.IntN(3) {
			links = append(links, randomLink(random))
		}
		tests = append(tests, links)
	}
	for _, links := range tests {
		p := newPace(newBudget(0))
		m := &wireModel{rate: links[0].rate, trip: links[0].trip}
		for i, next := range links[1:] {
			m.driveFor(p, 4*time.Second)
			m.rate, m.trip = next.rate, next.trip
			m.driveFor(p, 3*time.Second)
			busy, queued := m.driveFor(p, time.Second)
			holds := m.rate * float64(m.trip.Nanoseconds())
			if holds < 0.9*sweepWindow && busy < 0.85 {
				t.Errorf("change %d of %v: the link is busy for %.2f of the time; window %d of %.0f",
					i, links, busy, p.window, holds)
			}
			// After a measurement with little in flight, the whole window is requested at once, and a quarter more (grow).
			run := max(runTime, m.trip/runsPerTrip, time.Duration(leastRun/m.rate))
			if most := 5 * (m.trip + run + max(idleQueue, m.trip/2, 2*run)) / 4; queued > most {
				t.Errorf("change %d of %v: up to %v waits in front of the link, want %v", i, links, queued, most)
			}
		}
	}
}

// TestPaceKeepsTheLimit: in no second more comes than the limit allows, however fast the link is and however well pages
// pack. As much comes as the limit allows, if the link carries it.
func TestPaceKeepsTheLimit(t *testing.T) {
	const mib = 1 << 20
	for _, c := range []struct {
		limit uint64
		m     *wireModel
	}{
		{mib, &wireModel{rate: 0.125, trip: 200 * time.Microsecond}},
		{10 * mib, &wireModel{rate: 0.125, trip: 200 * time.Microsecond}},
		{10 * mib, &wireModel{rate: 0.125, trip: 10 * time.Millisecond}},
		{10 * mib, &wireModel{rate: 1.25, trip: 50 * time.Microsecond, pack: 0.1}},
		{100 * mib, &wireModel{rate: 0.125, trip: 200 * time.Microsecond}},
		{500 * mib, &wireModel{rate: 1.25, trip: 2 * time.Millisecond}},
		{500 * mib, &wireModel{rate: 2, trip: 30 * time.Microsecond, pack: 0.5}},
	} {
		for name, waits := range map[string]func(int) bool{"nobody waits": never, "threads wait": always} {
			m := *c.m
			p := newPace(newBudget(c.limit))
			m.zero = true
			m.drive(p, 100, waits)
			m.zero = false
			m.drive(p, 20_000, waits)
			paid := int64(float64(c.limit) * (time.Second + budgetCredit).Seconds())
			if most := m.most(time.Second); most > paid+max(p.budget.most(), p.window) {
				t.Errorf("limit %d, %v bytes a ns, %v, %s: %d bytes came within a second",
					c.limit, m.rate, m.trip, name, most)
			}
			sum := int64(0)
			for _, a := range m.arrived {
				sum += a.bytes
			}
			if rate := float64(sum) * 1e9 / float64(m.took); rate < 0.95*float64(c.limit) && name == "nobody waits" {
				t.Errorf("limit %d, %v bytes a ns, %v: only %.0f bytes a second", c.limit, m.rate, m.trip, rate)
			}
		}
	}
}

// TestLimitIsNotForZeros: zeros take nothing of the network, so the limit does not slow them down.
func TestLimitIsNotForZeros(t *testing.T) {
	p := newPace(newBudget(1 << 20))
	m := &wireModel{rate: 0.125, trip: 200 * time.Microsecond, zero: true}
	m.drive(p, 200, never)
	if m.took > time.Second.Nanoseconds() {
		t.Errorf("%d runs of zeros took %v", 200, time.Duration(m.took))
	}
}

func TestLimitChanges(t *testing.T) {
	p := newPace(newBudget(1 << 10)) // a run takes a minute
	m := &wireModel{rate: 0.125, trip: 200 * time.Microsecond}
	m.drive(p, 10, never)
	p.budget.spend(1<<20, m.now)
	if wait := time.Duration(p.budget.wait(m.now)); wait < 1000*time.Second {
		t.Fatalf("1 MiB at 1 KiB/s is paid after %v", wait)
	}
	p.budget.set(1 << 30)
	if wait := p.budget.wait(m.now); wait != 0 {
		t.Errorf("what came under the old limit is still paid, for %v", time.Duration(wait))
	}
	select {
	case <-p.budget.changed:
	default:
		t.Error("a sweep that sleeps does not learn that the limit has changed")
	}
	if busy, _ := m.drive(p, 2000, never); busy < 0.9 {
		t.Errorf("with a limit above it the link is busy for %.2f of the time", busy)
	}
}

func TestSweepGoesOnWhereEachThreadFaults(t *testing.T) {
	var h hints
	var f fronts
	if at := f.next(&h); *at != 0 {
		t.Errorf("before any fault it begins at page %d", *at)
	}
	h.set(1, 1000)
	h.set(2, 5000)
	var seen []uint64
	for range 4 {
		at := f.next(&h)
		seen = append(seen, *at)
		*at += 16
	}
	if want := []uint64{1000, 5000, 1016, 5016}; !slices.Equal(seen, want) {
		t.Errorf("it goes on at %d, want %d", seen, want)
	}
	h.set(1, 9000)
	if a, b := *f.next(&h), *f.next(&h); a != 9000 || b != 5032 {
		t.Errorf("after a new fault it goes on at %d and %d", a, b)
	}
}
