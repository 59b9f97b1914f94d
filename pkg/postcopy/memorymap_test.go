// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"context"
	"math/bits"
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

// mapless returns an engine that has nothing but blocks. Each has so many pages, of so many bytes.
func mapless(t testing.TB, blocks ...[2]uint64) *Engine {
	t.Helper()
	e := &Engine{}
	counts := make([]uint64, len(blocks))
	for i, b := range blocks {
		counts[i] = b[0]
	}
	var first []uint64
	var err error
	if e.pages, first, err = newPages(counts, nil); err != nil {
		t.Fatal(err)
	}
	for i, b := range blocks {
		e.blocks = append(e.blocks, block{
			Block: Block{Size: b[0] * b[1], PageSize: b[1]},
			index: i, first: first[i], pages: b[0], shift: bits.TrailingZeros64(b[1]),
		})
	}
	for i, h := range heatOf(e.blocks) {
		e.blocks[i].heat = h
	}
	return e
}

// sums adds up the cells of each block.
func sums(maps []BlockMap) (all []Cell) {
	for _, m := range maps {
		var sum Cell
		for _, c := range m.Cells {
			sum.add(c)
		}
		all = append(all, sum)
	}
	return all
}

// TestCellsAreBounded: the map of a VM has at most MostCells cells, however large the VM is. All cells have the same
// size, except where pages are larger than that. Each page is in one cell.
func TestCellsAreBounded(t *testing.T) {
	const small, huge = 4 << 10, 2 << 20
	for name, blocks := range map[string][][2]uint64{
		"a page":                {{1, small}},
		"less than a word":      {{15, small}},
		"many blocks":           {{1 << 18, small}, {64, small}, {1, small}, {4096, small}, {17, small}},
		"64 GiB":                {{1 << 24, small}, {64, small}},
		"1 TiB in huge pages":   {{1 << 19, huge}, {64, small}},
		"few huge pages":        {{3, huge}, {100, small}},
		"just as many as cells": {{MostCells * pagesPerWord, small}},
		"one page more":         {{MostCells*pagesPerWord + 1, small}},
	} {
		e := mapless(t, blocks...)
		maps := e.Map()
		cells, size := 0, uint64(0)
		for i, m := range maps {
			cells += len(m.Cells)
			if m.CellPages*uint64(len(m.Cells)) < blocks[i][0] || m.CellPages*uint64(len(m.Cells)-1) >= blocks[i][0] {
				t.Errorf("%s: block %d has %d cells of %d pages, and %d pages",
					name, i, len(m.Cells), m.CellPages, blocks[i][0])
			}
			if m.CellPages > 1 {
				if bytes := m.CellPages * m.PageSize; size != 0 && bytes != size {
					t.Errorf("%s: cells of %d and of %d bytes", name, size, bytes)
				} else {
					size = bytes
				}
			}
			if got := sums(maps)[i]; got != (Cell{Missing: uint32(blocks[i][0])}) {
				t.Errorf("%s: block %d is %+v", name, i, got)
			}
		}
		if cells > MostCells {
			t.Errorf("%s: %d cells", name, cells)
		}
		for _, most := range []int{1, 2, 7, 100, 1024, MostCells, 1 << 20} {
			coarse := Coarser(maps, most)
			cells = 0
			for _, m := range coarse {
				cells += len(m.Cells)
			}
			if cells > max(most, len(blocks)) || cells == 0 {
				t.Errorf("%s: %d cells, where %d are wanted at most", name, cells, most)
			}
			if diff := cmp.Diff(sums(maps), sums(coarse)); diff != "" {
				t.Errorf("%s: with %d cells at most, pages are lost (-fine +coarse):\n%s", name, most, diff)
			}
		}
	}
}

// TestMapIsTheTable compares the map with the states of single pages.
func TestMapIsTheTable(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	e := mapless(t, [2]uint64{40_001, 4096}, [2]uint64{33, 4096}, [2]uint64{MostCells * 64, 4096})
	for i := range e.blocks {
		b := &e.blocks[i]
		for p := b.first; p < b.end(); {
			s, n := state(random.IntN(int(ahead)+1)), uint64(random.IntN(70)) // runs of pages in the same state
			for ; n > 0 && p < b.end(); n-- {
				e.pages.swap(p, missing, s)
				p++
			}
		}
	}
	for i, m := range e.Map() {
		b := &e.blocks[i]
		for j, got := range m.Cells {
			var want Cell
			for p := b.first + uint64(j)*m.CellPages; p < min(b.end(), b.first+uint64(j+1)*m.CellPages); p++ {
				switch e.pages.get(p) {
				case missing:
					want.Missing++
				case swept, ahead, installing:
					want.Asked++
				case demanded, zeroing:
					want.Waited++
				case present:
					want.Present++
				case zero:
					want.Zero++
				}
			}
			if got != want {
				t.Fatalf("cell %d of block %d is %+v, its pages are %+v", j, i, got, want)
			}
		}
	}
}

// TestMapOfFaults: the map shows a page for which a thread waits, and later that a thread waited for it.
func TestMapOfFaults(t *testing.T) {
	const pages = 512
	g, w, l := newIdle(t, uffdtest.Shmem, pages)
	b := &g.blocks[0]
	ev := uffd.Event{Kind: uffd.EventPagefault}
	for _, p := range []uint64{40, 41, 300} {
		ev.Pagefault.Addr = b.addr(p)
		if err := w.handle(g.uffd, ev, g.now()); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.handle(g.uffd, ev, g.now()); err != nil { // a second thread waits for the last page
		t.Fatal(err)
	}
	if err := w.send(); err != nil {
		t.Fatal(err)
	}
	m := g.Map()[0]
	at := func(p uint64) Cell { return m.Cells[p/m.CellPages] }
	if at(40).Waited < 2 || at(40).Faulted != 2 || at(300).Waited < 1 || at(300).Faulted != 1 ||
		at(100) != (Cell{Missing: uint32(m.CellPages)}) {
		t.Errorf("while threads wait: %+v, %+v, %+v", at(40), at(300), at(100))
	}
	l.reply.Runs, l.reply.Data = append(l.reply.Runs[:0], pagesOf(40, 2)), make([]byte, 2*pageSize)
	if err := w.s.accept(l); err != nil {
		t.Fatal(err)
	}
	if m = g.Map()[0]; at(40).Present != 2 || at(40).Faulted != 2 {
		t.Errorf("when the pages are there: %+v", at(40))
	}
}

// TestMapWhileMemoryComes: while pages change their states, each page is in the map once.
func TestMapWhileMemoryComes(t *testing.T) {
	const pages = 4096
	l := layout{{kind: uffdtest.Shmem, pages: pages}, {kind: uffdtest.Anon, pages: 100}}
	g := newTarget(t, l, Options{})
	result := g.run(context.Background(), dial(t, realSource(t, l), defaultWorkers))
	touch := g.child.Go(uffdtest.Touch(uffd.Range{Start: g.blocks[0].Addr, Len: 64 * pageSize}, uffdtest.Shmem))
	until(t, "a fault", func() bool { return g.Stats().Causes.Missing > 0 }) // the sweep could be faster than the threads
	g.StartSweep()
	for over := false; !over; {
		select {
		case <-g.Done():
			over = true
		default:
		}
		for i, c := range sums(g.Map()) {
			if n := c.Missing + c.Asked + c.Waited + c.Present + c.Zero; uint64(n) != l[i].pages {
				t.Fatalf("block %d has %d pages, and %d of them: %+v", i, l[i].pages, n, c)
			}
			if over && c.Present+c.Zero != uint32(l[i].pages) {
				t.Errorf("in the end block %d is %+v", i, c)
			}
		}
	}
	touch.JoinOK()
	if err := await(t, "end of Run", result); err != nil {
		t.Fatal(err)
	}
	var faulted uint32
	for _, c := range sums(g.Map()) {
		faulted += c.Faulted
	}
	causes := g.Stats().Causes
	if want := causes.Missing + causes.Swept + causes.Ahead; uint64(faulted) != want || want == 0 {
		t.Errorf("%d pages were waited for on the map, %d by the counts", faulted, want)
	}
}

// BenchmarkMap draws the map of a VM of 64 GiB, half of which has come.
func BenchmarkMap(b *testing.B) {
	const pages = 1 << 24
	e := mapless(b, [2]uint64{pages, 4096})
	for p := uint64(0); p < pages; p += 2 * pagesPerWord {
		for q := range uint64(pagesPerWord) {
			e.pages.swap(p+q, missing, present)
		}
	}
	b.SetBytes(pages / 2) // of the page table
	for b.Loop() {
		e.Map()
	}
}
