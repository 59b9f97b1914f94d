// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"slices"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

// path is a simulated network: what so many lanes carry, in bytes a ns.
type path func(lanes int) float64

func noFaults() (uint64, int64) { return 0, 0 }

// sweepOver feeds scale with answers of 4 MiB that come over the path from one time on, for so long. It returns how
// much of that time there were how many lanes. share is the part of the bytes that is not zero.
func (s *scale) sweepOver(p path, from, last time.Duration, share float64) (spent map[int]time.Duration) {
	const answer = 4 << 20
	spent = map[int]time.Duration{}
	for now := from; now < from+last; {
		took := time.Duration(answer / p(s.lanes))
		now += took
		spent[s.lanes] += took
		s.came(now.Nanoseconds(), time.Millisecond.Nanoseconds(), answer, int64(share*answer), noFaults)
	}
	return spent
}

// upTo returns a path on which each lane carries rate, and all lanes together at most most.
func upTo(rate, most float64) path {
	return func(lanes int) float64 { return min(float64(lanes)*rate, most) }
}

// TestScale: most of the time there are as many lanes as make the sweep faster.
func TestScale(t *testing.T) {
	for _, c := range []struct {
		what string
		path path
		most int
		want int
	}{
		{"one fills the path", upTo(1, 1), 8, 1},
		{"another costs", func(lanes int) float64 { return 1 - 0.1*float64(lanes-1) }, 8, 1},
		{"another is worth little", func(lanes int) float64 { return 1 + 0.05*float64(lanes-1) }, 8, 1},
		{"two", upTo(1, 2), 8, 2},
		{"three", upTo(1, 3), 8, 3},
		{"more than there may be", upTo(1, 100), 8, 8},
		{"more than processors", upTo(1, 100), 2, 2},
		{"there may be one", upTo(1, 100), 1, 1},
	} {
		s := scale{lanes: 1, most: c.most}
		spent := s.sweepOver(c.path, 0, 10*time.Minute, 1)
		if spent[c.want] < 9*time.Minute {
			t.Errorf("%s: %v, want %d lanes", c.what, spent, c.want)
		}
		for lanes := range spent {
			if lanes < 1 || lanes > c.most {
				t.Errorf("%s: %d lanes, at most %d", c.what, lanes, c.most)
			}
		}
	}
}

// TestScaleFollows: when the path changes, the number of lanes follows.
func TestScaleFollows(t *testing.T) {
	s := scale{lanes: 1, most: 4}
	for i, wide := range []bool{true, false, true} {
		p, want := upTo(1, 1), 1
		if wide {
			p, want = upTo(1, 4), 4
		}
		s.sweepOver(p, time.Duration(i)*10*time.Minute, 8*time.Minute, 1)
		if spent := s.sweepOver(
			p, time.Duration(i)*10*time.Minute+8*time.Minute, 2*time.Minute, 1,
		); spent[want] < 100*time.Second {
			t.Errorf("path %d: %v after eight minutes, want %d lanes", i, spent, want)
		}
	}
}

// TestScaleOfZeros: the rate at which zeros come is not used for a decision.
func TestScaleOfZeros(t *testing.T) {
	s := scale{lanes: 1, most: 4}
	if spent := s.sweepOver(upTo(1, 4), 0, time.Minute, 0.25); len(spent) != 1 {
		t.Errorf("lanes by zeros: %v", spent)
	}
}

// TestScaleWaitsForTheRate: while a lane becomes faster by itself, as a new connection does, no other one is opened.
func TestScaleWaitsForTheRate(t *testing.T) {
	s := scale{lanes: 1, most: 4}
	rate := 0.01
	now := int64(0)
	for range 20 { // 4 seconds: the rate grows by a quarter every 200 ms
		for end := now + scaleTime.Nanoseconds(); now < end; {
			now += scaleTime.Nanoseconds() / 10
			s.came(now, 0, int64(rate*1e8), int64(rate*1e8), noFaults)
			if s.lanes != 1 {
				t.Fatalf("another lane at %v, at %.3f bytes a ns", time.Duration(now), rate)
			}
		}
		rate *= 1.25
	}
}

// TestScaleRefused: if no other lane can be opened, it is tried less and less often.
func TestScaleRefused(t *testing.T) {
	s := scale{lanes: 1, most: 4}
	var tries []time.Duration
	for now := time.Duration(0); now < 5*time.Minute; now += 20 * time.Millisecond {
		if s.came(now.Nanoseconds(), 0, 20e6, 20e6, noFaults) {
			tries = append(tries, now)
			s.lanes--
			s.refused(now.Nanoseconds())
		}
	}
	if len(tries) < 5 || len(tries) > 12 || !slices.IsSorted(tries) {
		t.Errorf("tried at %v", tries)
	}
}

// TestScaleSparesFaults: lanes that make faults slower are closed again, however fast they make the sweep. If there are
// hardly any faults, which prove nothing, they are kept.
func TestScaleSparesFaults(t *testing.T) {
	for _, c := range []struct {
		perAnswer uint64
		slower    int64
		want      int
	}{{10, 3, 1}, {10, 1, 4}, {0, 3, 4}} {
		s := scale{lanes: 1, most: 4}
		var n uint64
		var waited int64
		spent := map[int]time.Duration{}
		for now := time.Duration(0); now < 5*time.Minute; now += 20 * time.Millisecond {
			n += c.perAnswer
			each := int64(100_000)
			if s.lanes > 1 {
				each *= c.slower
			}
			waited += int64(c.perAnswer) * each
			bytes := int64(20e6) * int64(s.lanes)
			s.came(now.Nanoseconds(), 0, bytes, bytes, func() (uint64, int64) { return n, waited })
			spent[s.lanes] += 20 * time.Millisecond
		}
		if spent[c.want] < 4*time.Minute {
			t.Errorf("%+v: %v", c, spent)
		}
	}
}

// TestNoLaneIsTriedBeforeTheSweep: what Foresee names comes before StartSweep, over one lane. However long that takes,
// no other lane is opened: it would begin to sweep while the VM stands still.
func TestNoLaneIsTriedBeforeTheSweep(t *testing.T) {
	g, _, l := newIdle(t, uffdtest.Shmem, 4)
	s := &session{e: g.Engine}
	l.bulk = &bulkLane{woken: make(chan struct{}, 1)}
	s.bulk.pace, s.bulk.lanes, s.bulk.scale = newPace(g.budget), []*lane{l}, scale{lanes: 1, most: 2}
	for _, started := range []bool{false, true} {
		if started {
			g.StartSweep()
		}
		s.answered(l, pageSize, pageSize, pageSize)
		if measured := s.bulk.scale.began != 0; measured != started {
			t.Errorf("the sweep has begun: %v; it is measured: %v", started, measured)
		}
	}
}
