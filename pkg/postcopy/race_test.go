// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/pagewire"
	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

const pageSize = 4096

// expect joins a thread that reads and compares.
func expect(t testing.TB, p uffdtest.Pending, want uint64) {
	t.Helper()
	if v := p.JoinOK(); v != want {
		t.Errorf("a thread read %#x, want %#x", v, want)
	}
}

// pagesOf is a run of pages of block 0.
func pagesOf(page, n uint64) pagewire.Run {
	return pagewire.Run{Offset: page * pageSize, Length: uint32(n * pageSize)}
}

func zerosOf(page, n uint64) pagewire.Run {
	r := pagesOf(page, n)
	r.Zero = true
	return r
}

// sendPages answers for pages one by one, zero ones as such.
func (l *scriptedLane) sendPages(t testing.TB, page, n uint64) {
	t.Helper()
	for p := page; p < page+n; p++ {
		run := pagesOf(p, 1)
		run.Zero = isZero(0, p)
		l.send(t, pageSize, run)
	}
}

// start runs a target of that many pages with one worker over a script; the demand lane and the bulk lane are the
// test's to play.
func start(t *testing.T, pages uint64, o Options) (g *target, demand, bulk *scriptedLane, run func() <-chan error) {
	t.Helper()
	o.Workers = 1
	g = newTarget(t, layout{{kind: uffdtest.Shmem, pages: pages}}, o)
	l, theirs := scripted(t, 1)
	return g, theirs[0], theirs[1], func() <-chan error { return g.run(context.Background(), l) }
}

func mustEnd(t testing.TB, result <-chan error) {
	t.Helper()
	if err := await(t, "end of Run", result); err != nil {
		t.Fatal(err)
	}
}

// TestPromotion: a fault on a page that the sweep has asked for is asked for again, and whichever answer
// comes first is installed.
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
			// What was on its way came at any time: that is no round trip of the network.
			if ns := g.fastest.ns.Load(); ns != 0 {
				t.Errorf("a round trip of %d ns is taken for one", ns)
			}
		})
	}
}

// TestTwoFaultsOnePage: the page is asked for once, and both threads go on.
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

// TestSparse: zero pages that nobody waits for are not allocated; a thread that comes to one goes on at once.
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
	expect(t, g.read(0, 20, 0), 0) // not registered any more
}

// allocated is how many pages the file behind block 0 has.
func (g *target) allocated() int64 {
	g.t.Helper()
	var s unix.Stat_t
	r := g.blocks[0].all()
	if err := unix.Stat(fmt.Sprintf("/proc/%d/map_files/%x-%x", g.child.Pid, r.Start, r.End()), &s); err != nil {
		g.t.Fatal(err)
	}
	return s.Blocks * 512 / int64(os.Getpagesize())
}

// TestDiscardInFlight: the process gives a page up while its old content is about to be installed.
func TestDiscardInFlight(t *testing.T) {
	for _, c := range []struct {
		point    string
		discards bool
	}{
		{"install", false}, // the installer has not looked yet whether the page is still its own
		{"install", true},
		{"copy", true}, // it has looked, and is within the gate: the event must not be read
	} {
		t.Run(fmt.Sprintf("%s, gate %v", c.point, c.discards), func(t *testing.T) {
			g, demand, _, run := start(t, 2, Options{Discards: c.discards})
			park := g.parkAt(c.point, 1)
			result := run()
			thread := g.read(0, 1, 0)
			demand.answer(t, pageSize)
			park.await()

			b := &g.blocks[0]
			punch := g.child.Go(uffdtest.Punch(b.page(1)))
			if c.point == "install" {
				punch.JoinOK()   // the event is read meanwhile
				if !c.discards { // and marked: who comes between finds what doc.go says, unless the gate is there
					until(t, "marked", func() bool { return g.pages.get(1) != installing })
				}
			} else {
				until(t, "reader at the gate", func() bool {
					if g.gate.mu.TryRLock() {
						g.gate.mu.RUnlock()
						return false
					}
					return true
				})
				punch.WaitWaiting()
			}
			park.unpark()
			expect(t, thread, 0)
			if c.point == "copy" {
				punch.JoinOK()
			}
			expect(t, g.read(0, 1, 0), 0)
			expectAfter := g.read(0, 0, 0)
			demand.answer(t, pageSize)
			expect(t, expectAfter, word(0, 0, 0))
			mustEnd(t, result)
			expect(t, g.read(0, 1, 0), 0)
		})
	}
}

// TestDiscardReadNotMarked is gate.go's picture: the event is read, so the process drops the page, and its old content is
// to be copied before the reader has marked it. Without the gate it comes back, as doc.go says.
func TestDiscardReadNotMarked(t *testing.T) {
	for _, discards := range []bool{false, true} {
		t.Run(fmt.Sprintf("gate %v", discards), func(t *testing.T) {
			g, _, bulk, run := start(t, 2, Options{Discards: discards})
			installer, reader := g.parkAt("install", 1), g.parkAt("read", 0)
			g.StartSweep()
			result := run()
			bulk.asked(t)
			bulk.send(t, pageSize, pagesOf(1, 1))
			installer.await()
			punch := g.child.Go(uffdtest.Punch(g.blocks[0].page(1)))
			reader.await()
			punch.JoinOK()
			installer.unpark()
			want := uint64(0)
			if !discards {
				until(t, "installed", func() bool { return g.pages.get(1) == present })
				want = word(0, 1, 0)
			}
			reader.unpark()
			bulk.send(t, pageSize, pagesOf(0, 1))
			mustEnd(t, result)
			expect(t, g.read(0, 1, 0), want)
		})
	}
}

// TestDiscardWithWaiter: who waits for a page that is given up reads zero, and its content is dropped when it comes.
func TestDiscardWithWaiter(t *testing.T) {
	g, demand, _, run := start(t, 2, Options{})
	result := run()
	thread := g.read(0, 1, 0)
	demand.asked(t)
	g.child.Go(uffdtest.Punch(g.blocks[0].page(1))).JoinOK()
	expect(t, thread, 0)
	demand.send(t, pageSize, pagesOf(1, 1))
	last := g.read(0, 0, 0)
	demand.answer(t, pageSize)
	expect(t, last, word(0, 0, 0))
	mustEnd(t, result)
	expect(t, g.read(0, 1, 0), 0)
	if s := g.Stats(); s.Discarded != pageSize {
		t.Errorf("%d bytes discarded", s.Discarded)
	}
}

// TestDiscardDuringZero: the only worker is about to install a zero page when an event comes that only it can
// read. It must not wait for that.
func TestDiscardDuringZero(t *testing.T) {
	g, demand, bulk, run := start(t, 8, Options{Discards: true})
	park := g.parkAt("zero", 3)
	g.StartSweep()
	result := run()
	bulk.asked(t)
	bulk.send(t, pageSize, zerosOf(3, 1))
	until(t, "marked", func() bool { return g.Stats().PagesZero == 1 })
	thread := g.read(0, 3, 0)
	park.await()
	punch := g.child.Go(uffdtest.Punch(g.blocks[0].page(4)))
	punch.WaitWaiting()
	park.unpark()
	expect(t, thread, 0)
	punch.JoinOK()
	bulk.sendPages(t, 0, 3)
	bulk.sendPages(t, 4, 4) // the first of them is dropped
	mustEnd(t, result)
	expect(t, g.read(0, 4, 0), 0)
	expect(t, g.read(0, 5, 0), word(0, 5, 0))
	if len(demand.requests) != 0 {
		t.Error("a zero page was asked for")
	}
}

// TestDiscardOfPresentPage: also without an event it reads as zero (QEMU punches holes with fallocate).
func TestDiscardOfPresentPage(t *testing.T) {
	g, demand, _, run := start(t, 2, Options{})
	result := run()
	thread := g.read(0, 1, 0)
	demand.answer(t, pageSize)
	expect(t, thread, word(0, 1, 0))
	g.child.Go(uffdtest.Punch(g.blocks[0].page(1))).JoinOK()
	expect(t, g.read(0, 1, 0), 0)
	thread = g.read(0, 0, 0)
	demand.answer(t, pageSize)
	expect(t, thread, word(0, 0, 0))
	mustEnd(t, result)
}

// TestLateFaults: the last page comes while one fault is being dealt with and another is not read yet.
func TestLateFaults(t *testing.T) {
	g, _, bulk, run := start(t, 8, Options{})
	park := g.parkAt("zero", 3)
	g.StartSweep()
	result := run()
	bulk.asked(t)
	bulk.send(t, pageSize, zerosOf(1, 7))
	until(t, "marked", func() bool { return g.Stats().PagesZero == 7 })
	dealtWith := g.read(0, 3, 0)
	park.await() // the only worker
	unread := g.read(0, 4, 0)
	unread.WaitWaiting()
	bulk.send(t, pageSize, pagesOf(0, 1))
	await(t, "last page", g.pages.full)
	park.unpark()
	mustEnd(t, result)
	expect(t, dealtWith, 0)
	expect(t, unread, 0)
}

// TestExist: a page that somebody else put there stays where the file is not known, and is counted; where it is, the VM's
// content is written over it. Who waits for it goes on, and the pages around it come in.
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

// TestUnmap: memory that is unmapped is not waited for.
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

// Before the sweep a fault brings its neighbours along; they are there when they are needed.
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
	// A neighbour that is there already is not asked for again.
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
