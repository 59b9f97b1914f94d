// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"iter"
	"time"
)

// Durations is a histogram of durations, a copy that its owner alone uses. A bucket is at most 1/16 as wide as the
// durations in it are long. The zero value is empty.
type Durations struct {
	// Sum is the sum of all durations. The sum of an engine's durations is made of its buckets, and exact to 1/32.
	Sum    time.Duration
	counts [buckets]uint64
}

// Record adds one duration; a negative one counts as zero.
func (h *Durations) Record(d time.Duration) {
	d = max(0, d)
	h.counts[bucket(uint64(d))]++
	h.Sum += d
}

// Add adds all that o has.
func (h *Durations) Add(o *Durations) {
	for i, n := range &o.counts {
		h.counts[i] += n
	}
	h.Sum += o.Sum
}

// All yields the buckets that are not empty, shortest first: the longest duration that counts there, and how many there
// are.
func (h *Durations) All() iter.Seq2[time.Duration, uint64] {
	return func(yield func(time.Duration, uint64) bool) {
		for i, n := range &h.counts {
			if n > 0 && !yield(time.Duration(upper(i)), n) {
				return
			}
		}
	}
}

// AddLatency adds to h how long the faults so far took, from a fault's message being read to its page being installed.
// It may be called at any time, and takes no lock: a goroutine that adds a duration meanwhile does not wait.
func (e *Engine) AddLatency(h *Durations) {
	for i := range e.latency.counts {
		n := e.latency.counts[i].Load()
		if n == 0 {
			continue
		}
		h.counts[i] += n
		h.Sum += time.Duration(middle(i) * n)
	}
}
