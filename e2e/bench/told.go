// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"math/bits"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/migrated-vm/migrated/e2e/lab"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// ofReport fills in what migrated itself tells of the newest move, which began at from.
func (f *figures) ofReport(ctx context.Context, s *scene, from *lab.Host) error {
	out, err := ask(ctx, from, f.tls, "report", s.id(), "--json")
	if err != nil {
		return err
	}
	var r migratedv1.Report
	if err := protojson.Unmarshal([]byte(out), &r); err != nil {
		return fmt.Errorf("answer of migrated report: %w", err)
	}
	progress := r.GetMigration().GetProgress()
	f.FaultP50, f.FaultP99 = progress.GetFaultP50().AsDuration(), progress.GetFaultP99().AsDuration()
	f.Faults = inQEMUBuckets(r.GetIncoming().GetLatency())
	steps := r.GetDowntimeSteps()
	for _, step := range []struct {
		name string
		took *durationpb.Duration
	}{
		{"stop", steps.GetStopTime()},
		{"save", steps.GetSaveTime()},
		{"transfer", steps.GetTransferTime()},
		{"  load in all", steps.GetLoadTime()},
		{"commit", steps.GetCommitTime()},
		{"crossing", steps.GetCrossingTime()},
		{"continue", steps.GetContinueTime()},
	} {
		f.Steps = append(f.Steps, stepTime{step.name, step.took.AsDuration()})
	}
	return nil
}

// inQEMUBuckets counts faults as QEMU's postcopy-latency-dist does. Element N counts faults that took [2^N, 2^(N+1))
// µs; the first one also counts shorter faults. A bucket of migrated's is a sixteenth wide. All of its faults are
// counted where its longest fault belongs.
func inQEMUBuckets(latencies []*migratedv1.LatencyBucket) []uint64 {
	counts := []uint64{}
	for _, b := range latencies {
		n := qemuBucket(b.GetLongest().AsDuration())
		for len(counts) <= n {
			counts = append(counts, 0)
		}
		counts[n] += b.GetCount()
	}
	return counts
}

// qemuBucket returns the bucket of a latency.
func qemuBucket(d time.Duration) int {
	return max(0, bits.Len64(uint64(max(0, d.Microseconds())))-1)
}

// bucketName returns the range of a bucket.
func bucketName(n int) string {
	least := time.Duration(1<<n) * time.Microsecond
	return fmt.Sprintf("%v–%v", least, 2*least)
}

// addFaults adds the counts of one move to those of others.
func addFaults(to, from []uint64) []uint64 {
	for n, count := range from {
		if n == len(to) {
			to = append(to, 0)
		}
		to[n] += count
	}
	return to
}
