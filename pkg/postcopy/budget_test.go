// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"context"
	"testing"

	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

// TestLimitIsNotForFaults: with a limit under which a run of the sweep takes a minute, a thread that goes through all of
// memory waits for no page longer than without, and no page is asked for ahead of it.
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
		t.Errorf("in debt the sweep brought %d bytes, and %d pages were asked for ahead of a thread", swept, after.Guessed-before.Guessed)
	}
	if after.Bandwidth != 1<<10 {
		t.Errorf("the limit is shown as %d", after.Bandwidth)
	}
	mustEnd(t, run)
	g.verify()
}

// TestSweepHearsOfAnotherLimit: it sleeps until what came is paid, but no longer than the limit stands.
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
