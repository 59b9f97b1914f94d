// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"context"
	"testing"

	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

// TestLimitIsNotForFaults: under a limit with which a run of the sweep takes a minute, faults are answered as fast as
// without. Nothing is prefetched, because prefetches count for the limit.
func TestLimitIsNotForFaults(t *testing.T) {
	const pages = 4096
	l := layout{{kind: uffdtest.Shmem, pages: pages}}
	g := newTarget(t, l, Options{Bandwidth: 1 << 10})
	run := g.run(context.Background(), dial(t, realSource(t, l), g.workers))
	g.StartSweep()
	until(t, "in debt", func() bool { return g.budget.wait(g.now()) > patience.Nanoseconds() })
	before := g.Stats()
	g.child.Do(uffdtest.Touch(g.blocks[0].all(), uffdtest.Shmem))
	after := g.Stats()
	if swept := after.BytesReceived - after.DemandBytes; swept > firstWindow || after.Guessed != before.Guessed {
		t.Errorf("in debt the sweep brought %d bytes, and %d pages were asked for ahead of a thread",
			swept, after.Guessed-before.Guessed)
	}
	if after.Bandwidth != 1<<10 {
		t.Errorf("the limit is shown as %d", after.Bandwidth)
	}
	mustEnd(t, run)
	g.verify()
}

// TestSweepHearsOfAnotherLimit: a sweep that sleeps because of the limit wakes when the limit changes.
func TestSweepHearsOfAnotherLimit(t *testing.T) {
	l := layout{{kind: uffdtest.Shmem, pages: 1024}}
	g := newTarget(t, l, Options{Bandwidth: 1 << 10})
	run := g.run(context.Background(), dial(t, realSource(t, l), g.workers))
	g.StartSweep()
	until(t, "in debt with nothing under way", func() bool {
		_, asked := g.pages.firstSwept()
		return !asked && g.budget.wait(g.now()) > patience.Nanoseconds()
	})
	g.SetBandwidth(0)
	mustEnd(t, run)
	g.verify()
}
