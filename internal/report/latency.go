// SPDX-License-Identifier: Apache-2.0

package report

import (
	"time"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// Percentile is how long the share q of the timed faults took at most, 0 if there is none. It is what the engine says
// of 0.5 and 0.99: the end of a bucket, but none is longer than the longest fault.
func Percentile(latency []*migratedv1.LatencyBucket, longest time.Duration, q float64) time.Duration {
	total := Timed(latency)
	if total == 0 {
		return 0
	}
	rank, seen := uint64(q*float64(total-1))+1, uint64(0)
	for _, b := range latency {
		if seen += b.GetCount(); seen >= rank {
			return min(b.GetLongest().AsDuration(), longest)
		}
	}
	return longest
}

// Timed is how many faults were timed.
func Timed(latency []*migratedv1.LatencyBucket) (n uint64) {
	for _, b := range latency {
		n += b.GetCount()
	}
	return n
}

// A Column is how many faults took longer than the one before it says, and at most so long.
type Column struct {
	Longest time.Duration
	Count   uint64
}

// Columns joins buckets to powers of two of a microsecond, without a gap from the shortest to the longest. A bucket
// counts whole where its end is.
func Columns(latency []*migratedv1.LatencyBucket) (columns []Column) {
	for _, b := range latency {
		bound := time.Microsecond
		if n := len(columns); n > 0 {
			bound = columns[n-1].Longest
		}
		for ; bound < b.GetLongest().AsDuration(); bound *= 2 {
			if len(columns) > 0 && bound > columns[len(columns)-1].Longest {
				columns = append(columns, Column{Longest: bound})
			}
		}
		if n := len(columns); n == 0 || columns[n-1].Longest != bound {
			columns = append(columns, Column{Longest: bound})
		}
		columns[len(columns)-1].Count += b.GetCount()
	}
	return columns
}
