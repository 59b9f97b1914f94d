// SPDX-License-Identifier: Apache-2.0

package load

import (
	"sync/atomic"

	"github.com/migrated-vm/migrated/e2e/guest/report"
)

// histogram counts latencies since boot in a fixed array, so that recording neither allocates nor locks. One worker
// adds, the reporter reads.
type histogram [report.Buckets]atomic.Uint64

func (h *histogram) add(ns int64) { h[report.Bucket(ns)].Add(1) }

// take adds to w what was counted since seen, and updates seen.
func (h *histogram) take(w report.Histogram, seen *[report.Buckets]uint64) {
	for i := range h {
		if v := h[i].Load(); v != seen[i] {
			w[i] += v - seen[i]
			seen[i] = v
		}
	}
}
