// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/pagewire"
	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

const pageSize = 4096

// expect waits for a thread that reads a word, and compares the word.
func expect(t testing.TB, p uffdtest.Pending, want uint64) {
	t.Helper()
	if v := p.JoinOK(); v != want {
		t.Errorf("a thread read %#x, want %#x", v, want)
	}
}

// pagesOf returns a run of pages of block 0.
func pagesOf(page, n uint64) pagewire.Run {
	return pagewire.Run{Offset: page * pageSize, Length: uint32(n * pageSize)}
}

func zerosOf(page, n uint64) pagewire.Run {
	r := pagesOf(page, n)
	r.Zero = true
	return r
}

// sendPages answers for pages one by one, and sends zero pages as zero.
func (l *scriptedLane) sendPages(t testing.TB, page, n uint64) {
	t.Helper()
	for p := page; p < page+n; p++ {
		run := pagesOf(p, 1)
		run.Zero = isZero(0, p)
		l.send(t, pageSize, run)
	}
}

// start runs a target of so many pages with one worker. The test plays the source on the demand lane and on the bulk
// lane.
func start(t *testing.T, pages uint64, o Options) (g *target, demand, bulk *scriptedLane, run func() <-chan error) {
	t.Helper()
	o.Workers = 1
	g = newTarget(t, layout{{kind: uffdtest.Shmem, pages: pages}}, o)
	l, theirs := scripted(t, 1)
	return g, theirs[0], theirs[1], func() <-chan error { return g.run(context.Background(), l) }
}

// TestSleepers: Options.Sleeps is called for each worker, when it starts and when it ends.
func TestSleepers(t *testing.T) {
	var now, most atomic.Int64
	g, demand, _, run := start(t, 1, Options{Sleeps: func(threads int) {
		most.Store(max(most.Load(), now.Add(int64(threads))))
	}})
	result := run()
	thread := g.read(0, 0, 0)
	demand.answer(t, pageSize)
	expect(t, thread, word(0, 0, 0))
	mustEnd(t, result)
	if now.Load() != 0 || most.Load() != 1 {
		t.Errorf("%d threads sleep after Run, %d at most while it ran", now.Load(), most.Load())
	}
}

func mustEnd(t testing.TB, result <-chan error) {
	t.Helper()
	if err := await(t, "end of Run", result); err != nil {
		t.Fatal(err)
	}
}

// TestPromotion: a page that the sweep has requested, and on which a thread faults, is requested again on the demand
// lane. The answer that comes first is installed.
func TestPromotion(t *testing.T) {
	for _, bulkFirst := range []bool{true, false} {
		t.Run(fmt.Sprintf("bulk first %v", bulkFirst), func(t *testing.T) {
			const pages = 200
			g, demand, bulk, run := start(t, pages, Options{})
			g.StartSweep()
			result := run()
			const ran = firstWindow / 2 / pageSize
			if first, second := bulk.asked(t), bulk.asked(t); first.Length != ran*pageSize || second.Length != ran*pageSize {
				t.Fatalf("the sweep asked for %v and %v", first, second)
			}
			thread := g.read(0, 5, 8)
			if r := demand.asked(t); r != (pagewire.Range{Offset: 5 * pageSize, Length: pageSize}) {
				t.Fatalf("asked for %v on the demand lane", r)
			}
			if bulkFirst {
				bulk.sendPages(t, 0, ran)
				expect(t, thread, word(0, 5, 8))
				demand.send(t, pageSize, pagesOf(5, 1))
			} else {
				demand.send(t, pageSize, pagesOf(5, 1))
				expect(t, thread, word(0, 5, 8))
				bulk.sendPages(t, 0, ran)
			}
			bulk.sendPages(t, ran, ran)
			for p := uint64(2 * ran); p < pages; {
				n := uint64(bulk.asked(t).Length / pageSize)
				bulk.sendPages(t, p, n)
				p += n
			}
			mustEnd(t, result)
			g.verify()
			// The page was already on its way, so the time from the fault to its arrival is no round trip.
			if ns := g.fastest.ns.Load(); ns != 0 {
				t.Errorf("a round trip of %d ns is taken for one", ns)
			}
		})
	}
}

// TestTwoFaultsOnePage: the page is requested once, and both threads continue.
func TestTwoFaultsOnePage(t *testing.T) {
	g, demand, _, run := start(t, 2, Options{})
	result := run()
	one, two := g.read(0, 0, 0), g.read(0, 0, 8)
	until(t, "two faults", func() bool { return g.Stats().Faults >= 2 })
	demand.answer(t, pageSize)
	expect(t, one, word(0, 0, 0))
	expect(t, two, word(0, 0, 8))
	last := g.read(0, 1, 0)
	if r := demand.asked(t); r.Offset != pageSize {
		t.Errorf("asked again for the page at %#x", r.Offset)
	}
	demand.send(t, pageSize, pagesOf(1, 1))
	expect(t, last, word(0, 1, 0))
	mustEnd(t, result)
	if g.fastest.ns.Load() == 0 {
		t.Error("two round trips, and none is known")
	}
}

// TestSparse: a zero page for which no thread waits is not allocated. A thread that touches it later continues at once.
func TestSparse(t *testing.T) {
	g, _, bulk, run := start(t, 64, Options{})
	g.StartSweep()
	result := run()
	bulk.asked(t)
	bulk.send(t, pageSize, zerosOf(0, 63))
	until(t, "marked", func() bool { return g.Stats().PagesZero == 63 })
	if n := g.allocated(); n != 0 {
		t.Errorf("%d pages are allocated, none was needed", n)
	}
	expect(t, g.read(0, 7, 0), 0)
	if n := g.allocated(); n != 1 {
		t.Errorf("%d pages are allocated, one was touched", n)
	}
	bulk.send(t, pageSize, pagesOf(63, 1))
	mustEnd(t, result)
	if n := g.allocated(); n != 2 {
		t.Errorf("%d pages are allocated, want 2", n)
	}
	expect(t, g.read(0, 20, 0), 0) // the memory is no longer registered
}

// allocated returns how many pages the file behind block 0 has.
func (g *target) allocated() int64 {
	g.t.Helper()
	var s unix.Stat_t
	r := g.blocks[0].all()
	if err := unix.Stat(fmt.Sprintf("/proc/%d/map_files/%x-%x", g.child.Pid, r.Start, r.End()), &s); err != nil {
		g.t.Fatal(err)
	}
	return s.Blocks * 512 / int64(os.Getpagesize())
}

// TestLateFaults: the last page comes while the worker handles one fault, and another one has not been read.
func TestLateFaults(t *testing.T) {
	g, _, bulk, run := start(t, 8, Options{})
	park := g.parkAt("zero", 3)
	g.StartSweep()
	result := run()
	bulk.asked(t)
	bulk.send(t, pageSize, zerosOf(1, 7))
	until(t, "marked", func() bool { return g.Stats().PagesZero == 7 })
	dealtWith := g.read(0, 3, 0)
	park.await() // this is the only worker
	unread := g.read(0, 4, 0)
	unread.WaitWaiting()
	bulk.send(t, pageSize, pagesOf(0, 1))
	await(t, "last page", g.pages.full)
	park.unpark()
	mustEnd(t, result)
	expect(t, dealtWith, 0)
	expect(t, unread, 0)
}

// TestExist: if another process has made a page, and the engine does not know the file, the page stays as it is and is
// counted. If it knows the file, it writes the VM's content over it. Either way the thread that waits continues, and
// the pages around it come.
func TestExist(t *testing.T) {
	for _, unknown := range []bool{false, true} {
		t.Run(fmt.Sprintf("unknown file %v", unknown), func(t *testing.T) {
			g := newTarget(t, layout{{kind: uffdtest.Shmem, pages: 8, unknown: unknown}}, Options{Workers: 1})
			l, theirs := scripted(t, 1)
			demand, bulk := theirs[0], theirs[1]
			alias := g.child.Alias(g.blocks[0].all())
			g.StartSweep()
			result := g.run(context.Background(), l)
			bulk.asked(t)
			thread := g.read(0, 5, 8)
			demand.asked(t)
			g.child.Do(uffdtest.Write(alias+5*pageSize+8, 42))
			bulk.send(t, pageSize, pagesOf(4, 3), pagesOf(0, 3), zerosOf(3, 1), pagesOf(7, 1))
			want, stats := word(0, 5, 8), Stats{PagesTouched: 1}
			if unknown {
				want, stats = 42, Stats{PagesUnexplained: 1}
			}
			expect(t, thread, want)
			mustEnd(t, result)
			for p := range uint64(8) {
				if p != 5 {
					expect(t, g.read(0, p, 16), word(0, p, 16))
				}
			}
			if s := g.Stats(); s.PagesTouched != stats.PagesTouched || s.PagesUnexplained != stats.PagesUnexplained {
				t.Errorf("counted %+v, want %+v", s, stats)
			}
		})
	}
}

// TestUnmap: memory that is unmapped is not fetched.
func TestUnmap(t *testing.T) {
	g, demand, _, run := start(t, 8, Options{})
	result := run()
	thread := g.read(0, 0, 0)
	demand.answer(t, pageSize)
	expect(t, thread, word(0, 0, 0))
	b := &g.blocks[0]
	g.child.Go(uffdtest.Unmap(uffd.Range{Start: b.addr(1), Len: 7 * pageSize})).JoinOK()
	mustEnd(t, result)
}

// TestFaultAsksAhead: before the sweep begins, a fault requests the pages around it as well, and they are installed.
func TestFaultAsksAhead(t *testing.T) {
	g := newTarget(t, layout{{kind: uffdtest.Shmem, pages: 20}}, Options{Workers: 1, LoadAhead: 8 * pageSize})
	lanes, theirs := scripted(t, 1)
	demand := theirs[0]
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	result := g.run(ctx, lanes)
	first := g.read(0, 5, 0)
	if r := demand.asked(t); r.Offset != 5*pageSize || r.Length != 8*pageSize {
		t.Fatalf("asked for %d bytes at %#x", r.Length, r.Offset)
	}
	demand.sendPages(t, 5, 8)
	expect(t, first, word(0, 5, 0))
	expect(t, g.read(0, 12, 0), word(0, 12, 0))
	// A neighbour that has come is not requested again.
	before := g.read(0, 2, 0)
	if r := demand.asked(t); r.Offset != 2*pageSize || r.Length != 3*pageSize {
		t.Errorf("asked for %d bytes at %#x", r.Length, r.Offset)
	}
	demand.sendPages(t, 2, 3)
	expect(t, before, word(0, 2, 0))
	cancel()
	if err := await(t, "end of Run", result); !errors.Is(err, context.Canceled) {
		t.Errorf("Run ended with %v", err)
	}
}

// TestAnswerOvertakesItsFault: a page that the sweep requested comes when the worker has claimed it for a fault and not
// yet recorded the time. The fault must not stay recorded as waiting, because the sweep would leave room for it on the
// link for ever.
func TestAnswerOvertakesItsFault(t *testing.T) {
	for name, page := range map[string]uint64{"data": 5, "zeros": 3} {
		t.Run(name, func(t *testing.T) {
			const pages = firstWindow / pageSize
			g, demand, bulk, run := start(t, pages, Options{})
			park := g.parkAt("claimed", page)
			g.StartSweep()
			result := run()
			const ran = pages / 2
			bulk.asked(t)
			thread := g.read(0, page, 8)
			park.await()
			bulk.sendPages(t, 0, ran)
			until(t, "the page is there", func() bool { return !g.pages.isWaitedFor(page) })
			expect(t, thread, word(0, page, 8))
			park.unpark()
			demand.answer(t, pageSize) // it was requested again on the demand lane
			until(t, "nothing waits", func() bool { return g.pending.count.Load() == 0 })
			bulk.asked(t)
			bulk.sendPages(t, ran, ran)
			mustEnd(t, result)
			g.verify()
		})
	}
}
