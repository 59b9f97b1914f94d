// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"testing"

	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

// TestDiscardInFlight: the process gives up a page whose content is about to be installed. It does not wait for the
// installer. A thread that touches the page then waits for the installer alone.
func TestDiscardInFlight(t *testing.T) {
	for _, c := range []struct {
		point string
		want  uint64
	}{
		{"install", 0},          // the installer has not checked the page yet: the content is dropped
		{"copy", word(0, 1, 0)}, // it has checked: the content lands after the drop (discard.go)
		{"copied", 0},           // the content has landed before the drop
	} {
		t.Run(c.point, func(t *testing.T) {
			g, demand, _, run := start(t, 2, Options{})
			park := g.parkAt(c.point, 1)
			result := run()
			thread := g.read(0, 1, 0)
			demand.answer(t, pageSize)
			park.await()
			if c.point == "copied" {
				expect(t, thread, word(0, 1, 0))
			}
			g.child.Go(uffdtest.Punch(g.blocks[0].page(1))).JoinOK()
			until(t, "revoked", func() bool { return g.pages.get(1) == revoked })
			again := g.read(0, 1, 0) // if this thread is the first to touch the page again, it must not map zeros
			if c.point != "copied" {
				again.WaitWaiting()
			}
			park.unpark()
			expect(t, again, c.want)
			if c.point != "copied" {
				expect(t, thread, c.want)
			}
			until(t, "known", func() bool { s := g.pages.get(1); return s == present || s == zero })
			last := g.read(0, 0, 0)
			demand.answer(t, pageSize)
			expect(t, last, word(0, 0, 0))
			mustEnd(t, result)
			expect(t, g.read(0, 1, 0), c.want)
			if n := g.Stats().PagesUnexplained; n != 0 {
				t.Errorf("%d pages are not explained", n)
			}
		})
	}
}

// TestDiscardReadNotMarked: after the worker has read the event, and before it has marked the page, the process drops
// the page and its content is installed. Then the page has its content, and what is written to it stays.
func TestDiscardReadNotMarked(t *testing.T) {
	g, _, bulk, run := start(t, 2, Options{})
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
	until(t, "installed", func() bool { return g.pages.get(1) == present })
	g.child.Go(uffdtest.Write(g.blocks[0].addr(1), 4711)).JoinOK()
	reader.unpark()
	bulk.send(t, pageSize, pagesOf(0, 1))
	mustEnd(t, result)
	expect(t, g.read(0, 1, 0), 4711)
}

// TestDiscardWithWaiter: a thread that waits for a page that is given up reads zero. The content is dropped when it
// comes.
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

// TestDiscardDuringZero: the only worker is about to install a zero page when an event comes. Only this worker can read
// the event, so it must not wait until the event was read.
func TestDiscardDuringZero(t *testing.T) {
	g, demand, bulk, run := start(t, 8, Options{})
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
	bulk.sendPages(t, 4, 4) // the first page of these is dropped
	mustEnd(t, result)
	expect(t, g.read(0, 4, 0), 0)
	expect(t, g.read(0, 5, 0), word(0, 5, 0))
	if len(demand.requests) != 0 {
		t.Error("a zero page was asked for")
	}
}

// TestDiscardOfPresentPage: a hole in a page that was there reads as zero, also without an event (QEMU makes holes by
// fallocate(2)).
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

// TestManyThreadsAndADiscard: while the process gives memory up, more threads wait in holes than one read(2) returns
// messages. The kernel refuses to fill a hole until the event was read, and returns faults before events. So if the
// engine woke these threads at once, they would fault again before the event was read, again and again.
func TestManyThreadsAndADiscard(t *testing.T) {
	const threads, pages = 4 * eventBatch, 8 * eventBatch
	g, _, bulk, run := start(t, pages, Options{})
	park := g.parkAt("zero", 0)
	g.StartSweep()
	result := run()
	for p := uint64(0); p < pages-1; { // one page is left, so that the session goes on
		n := min(uint64(bulk.asked(t).Length/pageSize), pages-1-p)
		bulk.send(t, pageSize, zerosOf(p, n))
		p += n
	}
	until(t, "all are holes", func() bool { return g.Stats().PagesPresent == pages-1 })
	first := g.read(0, 0, 0)
	park.await()
	b := &g.blocks[0]
	gives := g.child.Go(uffdtest.Discard(uffd.Range{Start: b.Addr + (pages-2)*pageSize, Len: pageSize}))
	gives.WaitWaiting()
	var waiting []uffdtest.Pending
	for i := range threads {
		waiting = append(waiting, g.read(0, uint64(i)+1, 0))
	}
	for _, w := range waiting {
		w.WaitWaiting()
	}
	park.unpark()
	for _, w := range append(waiting, first) {
		expect(t, w, 0)
	}
	gives.JoinOK()
	if n := g.Stats().Faults; n > 16*threads {
		t.Errorf("%d threads faulted %d times", threads, n)
	}
	bulk.send(t, pageSize, zerosOf(pages-1, 1))
	mustEnd(t, result)
}

// TestDiscardByWords: of pages in every state, those inside the range change as each of them would alone, and those
// outside stay.
func TestDiscardByWords(t *testing.T) {
	const n = 3 * pagesPerWord
	became := map[state]state{
		missing: zero, swept: zero, demanded: zero, installing: revoked, present: present, zero: zero, zeroing: zeroing,
		ahead: zero, lost: zero, revoked: revoked,
	}
	for name, c := range map[string]struct{ first, end uint64 }{
		"all": {0, n}, "a word": {16, 32}, "within a word": {17, 20}, "across words": {5, 42}, "nothing": {7, 7},
	} {
		table, _, err := newPages([]uint64{n}, nil)
		if err != nil {
			t.Fatal(err)
		}
		at := func(p uint64) state { return state(p % uint64(len(became))) }
		wantLeft, wantLost := int64(0), int64(0)
		for p := range uint64(n) {
			table.swap(p, missing, at(p))
			inside := p >= c.first && p < c.end
			switch at(p) {
			case missing, swept, demanded, ahead:
				if !inside {
					wantLeft++
				}
			case installing, revoked:
				wantLeft++
			case lost:
				table.lost.Add(1)
				if !inside {
					wantLost++
				}
				table.left.Add(-1)
			default:
				table.left.Add(-1)
			}
		}
		table.discard(c.first, c.end-c.first)
		for p := range uint64(n) {
			want := at(p)
			if p >= c.first && p < c.end {
				want = became[want]
			}
			if got := table.get(p); got != want {
				t.Errorf("%s: page %d was in state %d and is in %d, want %d", name, p, at(p), got, want)
			}
		}
		if left, lost := table.left.Load(), table.lost.Load(); left != wantLeft || lost != wantLost {
			t.Errorf("%s: %d pages left and %d lost, want %d and %d", name, left, lost, wantLeft, wantLost)
		}
	}
}
