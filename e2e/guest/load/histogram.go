// SPDX-License-Identifier: Apache-2.0

package load

import (
	"math/bits"
	"sync/atomic"
)

// Latencies are counted in buckets of 1/8 of their power of two: 12 % precise,
// which is enough to tell a stall from none, and a fixed array, so that
// recording neither allocates nor locks.
const (
	subBits = 3
	buckets = 64 << subBits
)

// histogram counts latencies since boot. One worker adds, the reporter reads.
type histogram [buckets]atomic.Uint64

func bucketOf(ns int64) int {
	v := uint64(max(ns, 1))
	exp := bits.Len64(v) - 1
	if exp < subBits {
		return int(v)
	}
	sub := v >> (exp - subBits) & (1<<subBits - 1)
	return exp<<subBits + int(sub)
}

// upperBound is the largest latency in nanoseconds that bucket b counts.
func upperBound(b int) int64 {
	if b < 1<<subBits {
		return int64(b)
	}
	exp, sub := b>>subBits, b&(1<<subBits-1)
	return (int64(1<<subBits|sub)+1)<<(exp-subBits) - 1
}

func (h *histogram) add(ns int64) { h[bucketOf(ns)].Add(1) }

// window is the difference between two readings of a histogram.
type window struct {
	diff  [buckets]uint64
	total uint64
}

func (w *window) reset() { w.diff, w.total = [buckets]uint64{}, 0 }

// take adds what h counted since the last take; seen is per histogram.
func (w *window) take(h *histogram, seen *[buckets]uint64) {
	for i := range h {
		v := h[i].Load()
		w.diff[i] += v - seen[i]
		w.total += v - seen[i]
		seen[i] = v
	}
}

// quantile returns the latency in nanoseconds that q percent of the window do
// not exceed; 0 for an empty window.
func (w *window) quantile(percent uint64) int64 {
	if w.total == 0 {
		return 0
	}
	rank := max(1, (w.total*percent+99)/100)
	var sum uint64
	for i, n := range &w.diff {
		if sum += n; sum >= rank {
			return upperBound(i)
		}
	}
	return upperBound(buckets - 1)
}
