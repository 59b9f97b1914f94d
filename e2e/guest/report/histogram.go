// SPDX-License-Identifier: Apache-2.0

package report

import "math/bits"

// Latencies are counted in buckets of 1/8 of their power of two: to within 12 %, which is enough to recognize a stall.
const (
	subBits = 3
	// Buckets is the number of buckets.
	Buckets = 64 << subBits
)

// Bucket returns the bucket of a latency in nanoseconds.
func Bucket(ns int64) int {
	v := uint64(max(ns, 1))
	exp := bits.Len64(v) - 1
	if exp < subBits {
		return int(v)
	}
	sub := v >> (exp - subBits) & (1<<subBits - 1)
	return exp<<subBits + int(sub)
}

// upperBound returns the largest latency in nanoseconds that bucket b counts.
func upperBound(b int) int64 {
	if b < 1<<subBits {
		return int64(b)
	}
	exp, sub := b>>subBits, b&(1<<subBits-1)
	return (int64(1<<subBits|sub)+1)<<(exp-subBits) - 1
}

// A Histogram counts the latencies in each bucket. Empty buckets are left out.
type Histogram map[int]uint64

// Add adds the counts of another histogram.
func (h Histogram) Add(o Histogram) {
	for b, n := range o {
		h[b] += n
	}
}

// Quantile returns the latency in nanoseconds that is not exceeded by so many per mille of all; 0 if there are none.
func (h Histogram) Quantile(permille uint64) int64 {
	total := uint64(0)
	for _, n := range h {
		total += n
	}
	if total == 0 {
		return 0
	}
	rank, sum := max(1, (total*permille+999)/1000), uint64(0)
	for b := range Buckets {
		if sum += h[b]; sum >= rank {
			return upperBound(b)
		}
	}
	return upperBound(Buckets - 1)
}
