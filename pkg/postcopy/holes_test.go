// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"context"
	"errors"
	"testing"

	"github.com/migrated-vm/migrated/pkg/pagelane"
	"github.com/migrated-vm/migrated/pkg/pagewire"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

func holeOf(page, n uint64) pagewire.Run {
	r := pagesOf(page, n)
	r.Hole = true
	return r
}

// holed starts a target, and returns when its sweep has made two requests. asked is how many pages these were for.
func holed(
	t *testing.T, pages uint64, o Options,
) (g *target, demand, bulk *scriptedLane, result <-chan error, asked uint64) {
	t.Helper()
	g, demand, bulk, run := start(t, pages, o)
	result = run()
	g.StartSweep()
	asked = uint64(bulk.asked(t).Length) / pageSize
	return g, demand, bulk, result, asked + uint64(bulk.asked(t).Length)/pageSize
}

// TestFaultsWhileAHoleIsMarked: a thread that waits in a hole continues, whether its fault came before its page was
// marked or after it. Its own request need not be answered.
func TestFaultsWhileAHoleIsMarked(t *testing.T) {
	const pages = 512
	g, demand, bulk, run := start(t, pages, Options{})
	park := g.parkAt("hole", 320)
	result := run()
	early := g.read(0, 259, 0) // requested before the hole is known; it is among the pages that are marked first
	demand.asked(t)
	g.StartSweep()
	asked := uint64(bulk.asked(t).Length+bulk.asked(t).Length) / pageSize
	if asked > 256 {
		t.Fatalf("the sweep asked for %d pages", asked)
	}
	bulk.send(t, pageSize, pagesOf(0, 1), holeOf(257, pages-1-257))
	park.await() // words of the table before page 320 are marked, and the others are not
	expect(t, early, 0)
	marked := g.read(0, 300, 0)
	expect(t, marked, 0) // the worker installs it while the receiver that marks the hole is stopped
	var late []uffdtest.Pending
	for _, p := range []uint64{320, 335, 336, pages - 2} {
		late = append(late, g.read(0, p, 0))
		demand.asked(t)
	}
	park.unpark()
	for _, thread := range late {
		expect(t, thread, 0)
	}
	// The answers to these requests come late and are dropped, whatever they have.
	for _, p := range []uint64{259, 320, 335, 336, pages - 2} {
		demand.send(t, pageSize, pagesOf(p, 1))
	}
	bulk.sendPages(t, 1, asked-1)
	for left := pages - asked - (pages - 1 - 257); left > 0; {
		r := bulk.asked(t)
		bulk.sendPages(t, r.Offset/pageSize, uint64(r.Length)/pageSize)
		left -= uint64(r.Length) / pageSize
	}
	mustEnd(t, result)
	for _, p := range []uint64{257, 259, 300, 320, 335, 336, pages - 2} {
		expect(t, g.read(0, p, 0), 0)
	}
	for _, p := range []uint64{0, 1, 255, 256, pages - 1} {
		expect(t, g.read(0, p, 0), word(0, p, 0))
	}
	s := g.Stats()
	if s.PagesPresent != pages {
		t.Errorf("%d pages present, want %d", s.PagesPresent, pages)
	}
	if want := uint64(pages); s.BulkPages+s.DemandPages != want {
		t.Errorf("%d pages came on the bulk lane and %d on the demand lane, want %d", s.BulkPages, s.DemandPages, want)
	}
}

// TestHoleLeavesWhatIsThere: a hole does not change pages whose content came before, is being installed, or was
// requested by the sweep. Their own answer decides.
func TestHoleLeavesWhatIsThere(t *testing.T) {
	const pages = firstWindow / pageSize
	g, demand, bulk, result, asked := holed(t, pages, Options{})
	if asked != pages {
		t.Fatalf("the sweep asked for %d pages", asked)
	}
	bulk.send(t, pageSize, pagesOf(0, 1), holeOf(0, pages))
	bulk.sendPages(t, 1, pages-1)
	mustEnd(t, result)
	if len(demand.requests) != 0 {
		t.Error("something was asked for by a fault")
	}
	g.verify()
}

// TestDiscardWhileAHoleIsMarked: pages that are given up, some of them marked and some not, are zero, and are counted
// once.
func TestDiscardWhileAHoleIsMarked(t *testing.T) {
	const pages = 512
	g, demand, bulk, run := start(t, pages, Options{})
	park := g.parkAt("hole", 384)
	result := run()
	waiting := g.read(0, 400, 0)
	demand.asked(t)
	g.StartSweep()
	asked := uint64(bulk.asked(t).Length+bulk.asked(t).Length) / pageSize
	bulk.send(t, pageSize, pagesOf(0, 1), holeOf(asked, pages-asked))
	park.await()
	b := &g.blocks[0]
	gone := b.page(376)
	gone.Len = 48 * pageSize // 8 pages that are marked, and 40 that are not
	g.child.Go(uffdtest.Punch(gone)).JoinOK()
	expect(t, waiting, 0)
	park.unpark()
	bulk.sendPages(t, 1, asked-1)
	mustEnd(t, result)
	for _, p := range []uint64{376, 383, 384, 400, 423, 424, pages - 1} {
		expect(t, g.read(0, p, 0), 0)
	}
	if s := g.Stats(); s.PagesPresent != pages || s.Discarded != gone.Len {
		t.Errorf("%d pages present, %d bytes discarded", s.PagesPresent, s.Discarded)
	}
}

// TestHolesThatMayNotStay: for memory that has to be there in the end, the pages of a hole are requested.
func TestHolesThatMayNotStay(t *testing.T) {
	g, _, bulk, run := start(t, 300, Options{})
	g.blocks[0].Populated = true
	result := run()
	g.StartSweep()
	for at := uint64(0); at < 300; {
		n := uint64(bulk.asked(t).Length) / pageSize
		bulk.send(t, pageSize, zerosOf(at, n), holeOf(0, 300))
		at += n
	}
	mustEnd(t, result)
	if n := allocatedPages(t, g); n != 300 {
		t.Errorf("%d of 300 pages are there", n)
	}
}

// TestHostileHoles: a hole is checked like every other run, and is accepted beside an answer on a bulk lane only. A
// wrong one ends the session, and nothing outside of the block is marked.
func TestHostileHoles(t *testing.T) {
	const pages = 512
	for name, c := range map[string]struct {
		runs     []pagewire.Run
		onDemand bool
	}{
		"beyond the block":  {[]pagewire.Run{pagesOf(0, 1), holeOf(pages, 1)}, false},
		"across its end":    {[]pagewire.Run{pagesOf(0, 1), holeOf(300, pages)}, false},
		"as long as may be": {[]pagewire.Run{pagesOf(0, 1), {Length: 1<<32 - pageSize, Hole: true}}, false},
		"far beyond": {
			[]pagewire.Run{pagesOf(0, 1), {Offset: 1<<64 - 2*pageSize, Length: pageSize, Hole: true}}, false,
		},
		"of another block": {[]pagewire.Run{pagesOf(0, 1), {Block: 1, Length: pageSize, Hole: true}}, false},
		"not of whole pages": {
			[]pagewire.Run{pagesOf(0, 1), {Offset: 300 * pageSize, Length: pageSize / 2, Hole: true}}, false,
		},
		"misaligned": {
			[]pagewire.Run{pagesOf(0, 1), {Offset: 300*pageSize + 512, Length: pageSize, Hole: true}}, false,
		},
		"beside no answer":    {[]pagewire.Run{holeOf(300, 1)}, false},
		"before the answer":   {[]pagewire.Run{holeOf(300, 1), pagesOf(0, 1)}, false},
		"on a demand lane":    {[]pagewire.Run{pagesOf(300, 1), holeOf(400, 1)}, true},
		"more than was asked": {[]pagewire.Run{pagesOf(0, 1), holeOf(403, 1), zerosOf(0, 300)}, false},
	} {
		t.Run(name, func(t *testing.T) {
			g, demand, bulk, run := start(t, pages, Options{})
			result := run()
			thread := g.read(0, 300, 0)
			demand.asked(t)
			g.StartSweep()
			bulk.asked(t)
			bulk.asked(t)
			lane := bulk
			if c.onDemand {
				lane = demand
			}
			lane.send(t, pageSize, c.runs...)
			if err := await(t, "end of Run", result); !errors.Is(err, ErrProtocol) {
				t.Fatalf("Run: %v, want ErrProtocol", err)
			}
			if !c.onDemand {
				g.resume(pages)
				expect(t, thread, word(0, 300, 0))
			}
		})
	}
}

// TestHolesAreNotInFlight: the sweep continues behind a hole at once, however large it is.
func TestHolesAreNotInFlight(t *testing.T) {
	const pages = 1 << 20
	g, _, bulk, result, asked := holed(t, pages, Options{})
	var half []pagewire.Run // half of the request, so that the sweep has room for another one
	for p := range asked / 2 {
		half = append(half, pagesOf(p, 1))
		half[p].Zero = isZero(0, p)
	}
	bulk.send(t, pageSize, append(half, holeOf(asked, pages-asked-1))...)
	if r := bulk.asked(t); r.Offset != (pages-1)*pageSize || r.Length != pageSize {
		t.Fatalf("asked for %v, want the last page", r)
	}
	if n := g.Stats().PagesPresent; n != pages-asked/2-1 {
		t.Errorf("%d pages are there, want %d", n, pages-asked/2-1)
	}
	bulk.sendPages(t, asked/2, asked/2)
	bulk.sendPages(t, pages-1, 1)
	mustEnd(t, result)
}

// TestHoleOfNoAllocations: marking a hole allocates nothing, whether a thread waits in it or not.
func TestHoleOfNoAllocations(t *testing.T) {
	const pages = 1 << 16
	g, _, l := newIdle(t, uffdtest.Shmem, pages)
	s := &session{e: g.Engine}
	l.bulk = &bulkLane{woken: make(chan struct{}, 1)}
	s.ctx, s.fail = context.WithCancelCause(context.Background())
	defer s.fail(nil)
	s.bulk.pace, s.bulk.lanes, s.bulk.scale = newPace(g.budget), []*lane{l}, scale{lanes: 1, most: 1}
	next := uint64(0)
	if n := testing.AllocsPerRun(100, func() {
		g.pages.claimSweep(next, 1)
		g.pages.claimFault(next + 40)
		l.asked.Store(pageSize)
		l.reply.Runs, l.reply.Data = append(l.reply.Runs[:0], zerosOf(next, 1), holeOf(next+1, 199)), nil
		if err := s.accept(l); err != nil {
			t.Fatal(err)
		}
		next += 200
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// TestHoleThatCannotBeFilled: if one of several pages that threads wait for in a hole cannot be installed, none of them
// stays in the hands of a session that is over. The next session installs them.
func TestHoleThatCannotBeFilled(t *testing.T) {
	const pages = 64
	g, w, l := newIdle(t, uffdtest.Shmem, pages)
	l.bulk = &bulkLane{}
	for p := uint64(32); p < 35; p++ {
		g.pages.claimFault(p)
	}
	if err := g.uffd.Unregister(g.blocks[0].all()); err != nil {
		t.Fatal(err)
	}
	if _, err := w.s.acceptHole(l, &g.blocks[0], 32, 32, pageSize); !errors.Is(err, ErrRangeGone) {
		t.Fatalf("a hole in memory that is not registered: %v, want ErrRangeGone", err)
	}
	for p := uint64(32); p < 35; p++ {
		if s := g.pages.get(p); s != zero {
			t.Errorf("page %d is in state %d, want that it is a hole", p, s)
		}
	}
	if err := g.register(&g.blocks[0]); err != nil {
		t.Fatal(err)
	}
	lanes, _ := scripted(t, 1)
	ctx, cancel := context.WithCancel(context.Background())
	result := g.run(ctx, lanes)
	for p := uint64(32); p < 35; p++ {
		expect(t, g.read(0, p, 0), 0)
	}
	cancel()
	if err := await(t, "end of Run", result); !errors.Is(err, context.Canceled) {
		t.Errorf("Run: %v, want that it was cancelled", err)
	}
}

// noting is a lane that records its requests.
type noting struct {
	*pagelane.Client
	requests chan pagewire.Request
}

func (n noting) Send(request *pagewire.Request) error {
	n.requests <- pagewire.Request{Holes: request.Holes, Piece: request.Piece}
	return n.Client.Send(request)
}

// note has both lanes record their requests.
func note(l *lanes) (demanded, swept noting) {
	const most = 64 // more requests than a test leaves unread
	demanded = noting{l.demand[0].(*pagelane.Client), make(chan pagewire.Request, most)}
	swept = noting{l.bulk.(*pagelane.Client), make(chan pagewire.Request, most)}
	l.demand[0], l.bulk = demanded, swept
	return demanded, swept
}

// TestOnlyTheSweepTakesHoles: requests before the sweep has begun, and requests of faults, have no Holes, because
// searching and marking them takes time.
func TestOnlyTheSweepTakesHoles(t *testing.T) {
	const pages = 16
	g := newTarget(t, layout{{kind: uffdtest.Shmem, pages: pages}}, Options{Workers: 1})
	l, theirs := scripted(t, 1)
	demanded, swept := note(&l)
	g.Foresee([]Range{{Bytes: 2 * pageSize}})
	result := g.run(context.Background(), l)
	if await(t, "request for what is foreseen", swept.requests).Holes {
		t.Error("what is foreseen is asked for with holes")
	}
	theirs[1].answer(t, pageSize)
	thread := g.read(0, 5, 0)
	if await(t, "request of a fault", demanded.requests).Holes {
		t.Error("a fault asks with holes")
	}
	theirs[0].answer(t, pageSize)
	expect(t, thread, word(0, 5, 0))
	g.StartSweep()
	if !await(t, "request of the sweep", swept.requests).Holes {
		t.Error("the sweep asks without holes")
	}
	for left := uint64(pages - 3); left > 0; {
		r := theirs[1].asked(t)
		theirs[1].sendPages(t, r.Offset/pageSize, uint64(r.Length)/pageSize)
		left -= uint64(r.Length) / pageSize
	}
	mustEnd(t, result)
}
