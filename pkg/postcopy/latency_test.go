// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"math"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// TestHistogram compares quantiles with those of the sorted values.
func TestHistogram(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		values := rapid.SliceOfN(rapid.Int64Range(0, math.MaxInt64), 1, 200).Draw(t, "values")
		shift := rapid.IntRange(0, 62).Draw(t, "shift")
		var h histogram
		for i := range values {
			values[i] >>= shift
			h.add(time.Duration(values[i]))
		}
		slices.Sort(values)
		for _, q := range []float64{0, 0.5, 0.99, 1} {
			want := values[int(q*float64(len(values)-1))]
			got := int64(h.quantile(q))
			if got < want || got-want > want/16 {
				t.Fatalf("quantile %v is %d, want %d (to 1/16)", q, got, want)
			}
		}
	})
	var none histogram
	if none.quantile(0.5) != 0 {
		t.Error("a median of nothing")
	}
	none.add(-time.Second) // impossible, but must not panic
}

func TestPending(t *testing.T) {
	var p pending
	for i := range uint64(pendingSlots) {
		p.start(i*3, int64(i), i%2 == 0)
		p.start(i*3, -1, i%2 != 0) // changes nothing: the page waits already
	}
	for i := range uint64(pendingSlots) {
		if when, trip, ok := p.end(i * 3); ok && (when != int64(i) || trip != (i%2 == 0)) {
			t.Errorf("page %d since %d, want %d", i*3, when, i)
		} else if !ok && i < pendingSlots/2 {
			t.Errorf("page %d was not timed", i*3)
		}
		if _, _, ok := p.end(i * 3); ok {
			t.Errorf("page %d ended twice", i*3)
		}
	}
	if p.count.Load() != 0 {
		t.Errorf("%d slots are used", p.count.Load())
	}
}

// TestDurations: a recorded duration and one of an engine's histogram go into the same buckets. The sum of a histogram
// is exact to 1/32.
func TestDurations(t *testing.T) {
	var e Engine
	var recorded, read Durations
	for d := time.Duration(1); d < time.Minute; d = d*5/3 + 1 {
		recorded.Record(d)
		e.latency.add(d)
	}
	e.AddLatency(&read)
	if read.counts != recorded.counts {
		t.Errorf("read %v, recorded %v", read.counts, recorded.counts)
	}
	if off := (read.Sum - recorded.Sum).Abs(); off > recorded.Sum/32 {
		t.Errorf("the sum is %v, want %v", read.Sum, recorded.Sum)
	}
	before := recorded.Sum
	recorded.Add(&recorded)
	if recorded.Sum != 2*before {
		t.Errorf("the sum of two is %v, want %v", recorded.Sum, 2*before)
	}
}
