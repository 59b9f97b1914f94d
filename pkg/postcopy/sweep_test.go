// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"slices"
	"testing"

	"github.com/migrated-vm/migrated/internal/pagewire"
)

// What the sweep asks for at a time is what it has room for, or one page where a page is larger than that.
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
		e := &Engine{pages: table, blocks: []block{{Block: Block{PageSize: c.pageSize, Size: n * c.pageSize}, pages: n, shift: c.shift}}}
		for p := uint64(1); p < n; p += 7 { // holes that faults have left
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
				t.Fatalf("room for %d bytes, pages of %d: %d bytes in %d ranges of %d", c.room, c.pageSize, bytes, len(request.Ranges), sum)
			}
			total += bytes
		}
		if want := (n - uint64(143)) * c.pageSize; total != want {
			t.Errorf("pages of %d bytes: %d bytes asked for in all, want %d", c.pageSize, total, want)
		}
	}
}

// TestForesee: what loading will touch is asked for before the sweep begins, once, and not again by the sweep.
func TestForesee(t *testing.T) {
	const pages = 64
	g, demand, bulk, run := start(t, pages, Options{})
	g.Foresee([]Stretch{
		{Offset: pages * pageSize, Bytes: pageSize}, // there is no such memory
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

// TestForeseeWaitsForNoAnswer: the source answers nothing until it has stopped the VM, so all that is foreseen is asked for
// before, in however many messages.
func TestForeseeWaitsForNoAnswer(t *testing.T) {
	const pages = 3*2*sweepRanges + 2
	g, _, bulk, run := start(t, pages, Options{})
	var all []Stretch
	for p := uint64(0); p+1 < pages; p += 2 {
		all = append(all, Stretch{Offset: p * pageSize, Bytes: pageSize})
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

// TestSweepBringsFirstBlocksFirst: also where threads have faulted somewhere else.
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
