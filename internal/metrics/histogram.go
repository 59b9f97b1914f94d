// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"math"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/proto"

	"github.com/migrated-vm/migrated/pkg/postcopy"
)

// Upper bounds of the classic buckets: powers of two of a microsecond. Those of faults are QEMU's: bucket N of its
// postcopy-latency-dist has the faults that took 2^N to 2^(N+1) microseconds.
var (
	latencyBounds  = powersOfTwo(0, 24) // to 17 s
	downtimeBounds = powersOfTwo(8, 24) // from 256 us
)

func powersOfTwo(from, to int) (bounds []time.Duration) {
	for n := from; n <= to; n++ {
		bounds = append(bounds, time.Microsecond<<n)
	}
	return bounds
}

const (
	// schema is the resolution of native histograms: 2^schema buckets for each power of two. A bucket is 9 % wide, a
	// little more than one of a postcopy.Durations.
	schema = 3
	// zeroThreshold is the width of the native bucket around 0, in seconds. It is less than a system call takes.
	zeroThreshold = 1e-9
)

// histogram implements prometheus.Metric. It has both forms of histograms: servers that ask for Protocol Buffers get
// the native form as well. All durations in a bucket of postcopy.Durations count as its upper end.
type histogram struct {
	desc   *prometheus.Desc
	labels []*dto.LabelPair
	bounds []time.Duration
	of     *postcopy.Durations
}

func sendHistogram(
	to chan<- prometheus.Metric, f *family, bounds []time.Duration, of *postcopy.Durations, labels ...string,
) {
	to <- &histogram{f.desc, prometheus.MakeLabelPairs(f.desc, labels), bounds, of}
}

// Desc returns the description of the family.
func (h *histogram) Desc() *prometheus.Desc { return h.desc }

// Write fills in the message for Prometheus.
func (h *histogram) Write(to *dto.Metric) error {
	classic := make([]uint64, len(h.bounds))
	native := make(map[int]int64)
	var count, zeros uint64
	for longest, n := range h.of.All() {
		count += n
		if i, _ := slices.BinarySearch(h.bounds, longest); i < len(classic) {
			classic[i] += n
		}
		if seconds := longest.Seconds(); seconds <= zeroThreshold {
			zeros += n
		} else {
			native[nativeBucket(seconds)] += int64(n)
		}
	}
	made := &dto.Histogram{
		SampleCount: proto.Uint64(count), SampleSum: proto.Float64(h.of.Sum.Seconds()),
		Schema: proto.Int32(schema), ZeroThreshold: proto.Float64(zeroThreshold), ZeroCount: proto.Uint64(zeros),
	}
	below := uint64(0)
	for i, bound := range h.bounds {
		below += classic[i]
		made.Bucket = append(made.Bucket, &dto.Bucket{
			UpperBound: proto.Float64(bound.Seconds()), CumulativeCount: proto.Uint64(below),
		})
	}
	made.PositiveSpan, made.PositiveDelta = spans(native)
	if len(native) == 0 { // without a span, Prometheus would not see a native histogram
		made.PositiveSpan = []*dto.BucketSpan{{Offset: proto.Int32(0), Length: proto.Uint32(0)}}
	}
	to.Label, to.Histogram = h.labels, made
	return nil
}

// nativeBucket returns the index of the native bucket of a duration: the lowest index whose upper end,
// 2^(index/2^schema), is not below seconds.
func nativeBucket(seconds float64) int { return int(math.Ceil(math.Log2(seconds) * (1 << schema))) }

// spans encodes buckets for Prometheus: the runs of buckets without a gap, each with its distance to the previous run,
// and for each bucket the difference of its count to that of the previous bucket.
func spans(buckets map[int]int64) (spans []*dto.BucketSpan, deltas []int64) {
	var indices []int
	for i := range buckets {
		indices = append(indices, i)
	}
	slices.Sort(indices)
	next, before := 0, int64(0)
	for _, i := range indices {
		if len(spans) == 0 || i != next {
			spans = append(spans, &dto.BucketSpan{Offset: proto.Int32(int32(i - next)), Length: proto.Uint32(0)})
		}
		*spans[len(spans)-1].Length++
		deltas = append(deltas, buckets[i]-before)
		next, before = i+1, buckets[i]
	}
	return spans, deltas
}
