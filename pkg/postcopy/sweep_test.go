// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"context"
	"slices"
	"testing"

	"github.com/migrated-vm/migrated/pkg/pagewire"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

// TestSweepAsksForNoMoreThanItMay: a request of the sweep is for as much as there is room for, or for one page if a
// page is larger than that.
func TestSweepAsksForNoMoreThanItMay(t *testing.T) {
	for _, c := range []struct {
		pageSize, room, want uint64
		shift                int
	}{
		{4 << 10, 64 << 10, 64 << 10, 12},
		{4 << 10, 66 << 10, 64 << 10, 12},
		{2 << 20, 64 << 10, 2 << 20, 21},
		{2 << 20, 5 << 20, 4 << 20, 21},
	} {
		const n = 1000
		table := mustPages(t, n)
		e := &Engine{pages: table, blocks: []block{
			{Block: Block{PageSize: c.pageSize, Size: n * c.pageSize}, pages: n, shift: c.shift},
		}}
		for p := uint64(1); p < n; p += 7 { // these pages are not missing, because threads faulted on them
			if table.claimFault(p) != claimRequest {
				t.Fatal("a page of a fresh table is not missing")
			}
		}
		s := &session{e: e}
		cursor, total := uint64(0), uint64(0)
		for {
			var request pagewire.Request
			var bytes uint64
			if bytes, cursor = s.claim(&request, cursor, c.room); bytes == 0 {
				break
			}
			sum := uint64(0)
			for _, r := range request.Ranges {
				sum += uint64(r.Length)
			}
			if sum != bytes || bytes > c.want || bytes > pagewire.MaxRequestedBytes || len(request.Ranges) > pagewire.MaxRanges {
				t.Fatalf("room for %d bytes, pages of %d: %d bytes in %d ranges of %d",
					c.room, c.pageSize, bytes, len(request.Ranges), sum)
			}
			total += bytes
		}
		if want := (n - uint64(143)) * c.pageSize; total != want {
			t.Errorf("pages of %d bytes: %d bytes asked for in all, want %d", c.pageSize, total, want)
		}
	}
}

// TestForesee: what loading the devices will touch is requested before the sweep begins, once, and not again by the
// sweep.
func TestForesee(t *testing.T) {
	const pages = 64
	g, demand, bulk, run := start(t, pages, Options{})
	g.Foresee([]Range{
		{Offset: pages * pageSize, Bytes: pageSize}, // beyond the memory
		{Offset: 16*pageSize + 1, Bytes: 8 * pageSize}, {Offset: 40 * pageSize, Bytes: 2 * pageSize},
	})
	result := run()
	if r := bulk.asked(t); r != (pagewire.Range{Offset: 16 * pageSize, Length: 8 * pageSize}) {
		t.Fatalf("asked for %v ahead", r)
	}
	if r := bulk.asked(t); r != (pagewire.Range{Offset: 40 * pageSize, Length: 2 * pageSize}) {
		t.Fatalf("asked for %v ahead, in the second place", r)
	}
	bulk.sendPages(t, 16, 8)
	bulk.sendPages(t, 40, 2)
	until(t, "installed", func() bool { return g.pages.get(23) == present && g.pages.get(41) == present })
	expect(t, g.read(0, 20, 8), word(0, 20, 8))
	if g.Stats().Faults != 0 {
		t.Error("a thread had to wait for it")
	}
	thread := g.read(0, 30, 0)
	if r := demand.asked(t); r.Offset != 30*pageSize {
		t.Fatalf("asked for %v when a thread waited", r)
	}
	demand.send(t, pageSize, pagesOf(30, 1))
	expect(t, thread, word(0, 30, 0))
	g.StartSweep()
	asked := uint64(0)
	for asked < pages-11 {
		r := bulk.asked(t)
		if p, n := r.Offset/pageSize, uint64(r.Length)/pageSize; p < 24 && p+n > 16 || p < 42 && p+n > 40 {
			t.Fatalf("the sweep asks for %v once more", r)
		}
		bulk.sendPages(t, r.Offset/pageSize, uint64(r.Length)/pageSize)
		asked += uint64(r.Length) / pageSize
	}
	mustEnd(t, result)
	g.verify()
}

// TestForeseeWaitsForNoAnswer: the source does not answer before it has stopped the VM. So all of what is foreseen is
// requested without waiting for an answer, in as many messages as it takes.
func TestForeseeWaitsForNoAnswer(t *testing.T) {
	const pages = 3*2*sweepRanges + 2
	g, _, bulk, run := start(t, pages, Options{})
	var all []Range
	for p := uint64(0); p+1 < pages; p += 2 {
		all = append(all, Range{Offset: p * pageSize, Bytes: pageSize})
	}
	g.Foresee(all)
	result := run()
	for _, f := range all {
		if r := bulk.asked(t); r != (pagewire.Range{Offset: f.Offset, Length: pageSize}) {
			t.Fatalf("asked for %v instead of %v", r, f)
		}
	}
	for _, f := range all {
		bulk.sendPages(t, f.Offset/pageSize, 1)
	}
	g.StartSweep()
	for range all {
		r := bulk.asked(t)
		bulk.sendPages(t, r.Offset/pageSize, uint64(r.Length)/pageSize)
	}
	mustEnd(t, result)
	g.verify()
}

// TestSweepBringsFirstBlocksFirst: blocks that are First come first, also if threads fault somewhere else.
func TestSweepBringsFirstBlocksFirst(t *testing.T) {
	const n = 64
	p, first, err := newPages([]uint64{n, n, n, n}, nil)
	if err != nil {
		t.Fatal(err)
	}
	e := &Engine{pages: p}
	for i := range first {
		b := Block{PageSize: 4096, Size: n * 4096, First: i%2 == 1}
		e.blocks = append(e.blocks, block{Block: b, index: i, first: first[i], pages: n, shift: 12})
	}
	var h hints
	h.set(1, first[2]+5)
	f := fronts{firsts: e.firsts()}
	s := &session{e: e}
	var order []uint32
	for range 4 * n {
		cursor := f.next(&h)
		if at := f.first(p); at != nil {
			cursor = at
		}
		var request pagewire.Request
		bytes, next := s.claim(&request, *cursor, n*4096)
		if bytes == 0 {
			break
		}
		*cursor = next
		order = append(order, request.Ranges[0].Block)
	}
	if want := []uint32{1, 3, 2, 0}; !slices.Equal(slices.Compact(order), want) {
		t.Errorf("the sweep goes through blocks %v, want %v", order, want)
	}
}

// TestFirstBlocksAreSearchedOnce: in a block that is First the sweep continues its search where it was. Beginning anew
// would go through all of a large block for each run.
func TestFirstBlocksAreSearchedOnce(t *testing.T) {
	const n = 1024
	p := mustPages(t, n)
	s := &session{e: &Engine{pages: p, blocks: []block{
		{Block: Block{PageSize: 4096, Size: n * 4096, First: true}, pages: n, shift: 12},
	}}}
	f := fronts{firsts: s.e.firsts()}
	for asked := uint64(0); asked < n; asked += 16 {
		at := f.first(p)
		if at == nil || *at != asked || f.firsts[0].first != asked {
			t.Fatalf("after %d pages it looks from page %d, and goes on at %v", asked, f.firsts[0].first, at)
		}
		var request pagewire.Request
		_, *at = s.claim(&request, *at, 16*4096)
	}
	if at := f.first(p); at != nil {
		t.Errorf("it goes on at page %d, and all is asked for", *at)
	}
}

// TestRunsComeInPiecesWhileAThreadWaits: while a thread waits, the sweep asks for replies of small pieces, so that a
// page of a run need not wait for the whole run.
func TestRunsComeInPiecesWhileAThreadWaits(t *testing.T) {
	const pages = 64
	g := newTarget(t, layout{{kind: uffdtest.Shmem, pages: pages}}, Options{Workers: 1})
	l, theirs := scripted(t, 1)
	demanded, swept := note(&l)
	result := g.run(context.Background(), l)
	thread := g.read(0, pages-1, 0)
	if piece := await(t, "request of a fault", demanded.requests).Piece; piece != 0 {
		t.Errorf("a fault asks for pieces of %d bytes", piece)
	}
	g.StartSweep()
	if piece := await(t, "request of the sweep", swept.requests).Piece; piece != pagewire.LeastPiece {
		t.Errorf("while a thread waits, the sweep asks for pieces of %d bytes, want %d", piece, pagewire.LeastPiece)
	}
	theirs[0].answer(t, pageSize)
	expect(t, thread, word(0, pages-1, 0))
	until(t, "known that no thread waits", func() bool { return g.pending.count.Load() == 0 }) // after it was woken
	last := uint32(pagewire.LeastPiece)
	for left := uint64(pages - 1); left > 0; {
		r := theirs[1].asked(t)
		theirs[1].sendPages(t, r.Offset/pageSize, uint64(r.Length)/pageSize)
		left -= uint64(r.Length) / pageSize
	}
	mustEnd(t, result)
	for len(swept.requests) > 0 {
		last = (<-swept.requests).Piece
	}
	if last != 0 {
		t.Errorf("nobody waits any more, and the sweep asks for pieces of %d bytes", last)
	}
}

// TestSweepGoesNearFaults: every second run of the sweep is near the last faults that followed no pattern, behind them
// and before them, in their block.
func TestSweepGoesNearFaults(t *testing.T) {
	const n, run = 4096, 16
	p, first, err := newPages([]uint64{n, n, 4}, nil)
	if err != nil {
		t.Fatal(err)
	}
	e := &Engine{pages: p, blocks: []block{
		{Block: Block{PageSize: 4096, Size: n * 4096}, pages: n, shift: 12},
		{Block: Block{PageSize: 4096, Size: n * 4096}, index: 1, first: first[1], pages: n, shift: 12},
		{Block: Block{PageSize: 2 << 20, Size: 4 * 2 << 20}, index: 2, first: first[2], pages: 4, shift: 21},
	}}
	s := &session{e: e}
	s.bulk.pace = newPace(nil)
	fault := func(thread uint32, page uint64) {
		if p.claimFault(page) != claimRequest {
			t.Fatalf("page %d is not missing", page)
		}
		e.hints.faulted(thread, page)
	}
	next := func() (got []span) {
		var request pagewire.Request
		if bytes, missing := s.choose(&request, run*4096); bytes == 0 || !missing {
			t.Fatalf("%d bytes are asked for, missing %v", bytes, missing)
		}
		for _, r := range request.Ranges {
			b := &e.blocks[r.Block]
			at := b.first + r.Offset>>b.shift
			got = append(got, span{at, at + uint64(r.Length)>>b.shift})
		}
		return got
	}
	want := func(what string, got []span, wanted ...span) {
		t.Helper()
		if !slices.Equal(got, wanted) {
			t.Errorf("%s: it asks for %v, want %v", what, got, wanted)
		}
	}
	fault(1, 1000)
	want("behind the fault", next(), span{1001, 1017})
	want("on from where the thread was", next(), span{1017, 1033})
	want("before the fault", next(), span{968, 984})
	fault(2, 3000)
	want("the thread that has faulted", next(), span{3001, 3017})
	want("behind the last fault", next(), span{3017, 3032}, span{2968, 2969})
	want("on from where that was", next(), span{3032, 3048})
	want("before the last fault", next(), span{2969, 2985})
	next()
	next()
	next()
	want("near the fault before", next(), span{985, 1000})
	for len(s.bulk.fronts.near) > 0 {
		next()
	}
	s.bulk.fronts.isNear = false
	fault(1, first[1]+2)
	want("at the beginning of a block", next(), span{first[1] + 3, first[1] + 19})
	next()
	want("not beyond it", next()[:1], span{first[1], first[1] + 2})
	s.bulk.pace.trip = nearTrip + 1
	s.bulk.fronts.isNear = false
	fault(2, 500)
	next()
	next()
	if s.bulk.fronts.isNear {
		t.Error("it goes near faults on a long path")
	}
	fault(1, first[2]+1)
	for range 2 * nearFaults {
		fault(3, 10)
		p.swap(10, demanded, missing)
	}
	s.takeNear()
	if most := 2 * nearFaults; len(s.bulk.fronts.near) > most {
		t.Errorf("%d places are remembered, want at most %d", len(s.bulk.fronts.near), most)
	}
}
