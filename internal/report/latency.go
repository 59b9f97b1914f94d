// SPDX-License-Identifier: Apache-2.0

package report

import (
	"time"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// Percentile returns the time within which the share q of the timed faults was resolved, 0 if there are none. It is the
// upper end of a bucket, but at most longest, the longest fault. The engine computes its percentiles in the same way.
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

// Timed returns the number of faults that were timed.
func Timed(latency []*migratedv1.LatencyBucket) (n uint64) {
	for _, b := range latency {
		n += b.GetCount()
	}
	return n
}

// A Column is the number of faults that took at most Longest, and longer than the previous Column's Longest.
type Column struct {
	Longest time.Duration
	Count   uint64
}

// Columns joins buckets into columns that end at powers of two of a microsecond, without a gap from the shortest to the
// longest. All faults in a bucket count as its upper end.
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
