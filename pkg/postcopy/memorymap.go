// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"math/bits"
	"sync/atomic"
)

// MostCells is how many cells a map of memory has at most.
const MostCells = 4096

// leastCell is the least memory that a cell covers, in bytes, unless a page is larger: a word of the page table.
const leastCell = pagesPerWord * 4096

// A Cell says for a part of memory how many pages are in each state.
type Cell struct {
	Missing uint32 // nobody has asked for it
	Asked   uint32 // asked for, or being installed, and no thread waits for it as far as is known
	Waited  uint32 // asked for, and a thread waits for it
	Present uint32
	Zero    uint32 // known to be zero, and left as a hole
	// Faulted is how many pages, since New, were asked for because a thread waited for them. A page that was asked for
	// again, after a lost connection, counts again. A gigantic page counts once, not once for each of its parts.
	Faulted uint32
}

func (c *Cell) add(o Cell) {
	c.Missing += o.Missing
	c.Asked += o.Asked
	c.Waited += o.Waited
	c.Present += o.Present
	c.Zero += o.Zero
	c.Faulted += o.Faulted
}

// A BlockMap is a block as cells of CellPages pages each. The last cell has the pages that are left.
type BlockMap struct {
	ID        string // Block's
	Size      uint64 // bytes
	PageSize  uint64 // bytes: what one state describes; of a gigantic page, a part
	CellPages uint64
	Cells     []Cell
}

// heat counts the pages that threads waited for, by cell of the finest map. This is all that the map costs a fault: one
// addition, mostly to a cache line of the worker's own.
type heat struct {
	shift uint // log2 of the pages of a cell
	cells []atomic.Uint32
}

func (h *heat) add(page uint64) { h.cells[page>>h.shift].Add(1) }

// heatOf chooses the cells of blocks, as small as they can be.
func heatOf(blocks []block) []heat {
	all := make([]heat, len(blocks))
	for size := uint64(leastCell); ; size *= 2 {
		cells := uint64(0)
		for i := range blocks {
			all[i].shift = uint(bits.TrailingZeros64(max(1, size/blocks[i].unit())))
			cells += cellsFor(blocks[i].pages, all[i].shift)
		}
		if cells <= max(MostCells, uint64(len(blocks))) {
			break
		}
	}
	for i := range blocks {
		all[i].cells = make([]atomic.Uint32, cellsFor(blocks[i].pages, all[i].shift))
	}
	return all
}

func cellsFor(pages uint64, shift uint) uint64 { return (pages + 1<<shift - 1) >> shift }

// Map says which memory is where, in as small cells as possible. It reads the states as they are, so a page that
// changes meanwhile may be in its old state or its new one. It must not be called when Options.State is gone.
func (e *Engine) Map() []BlockMap {
	all := make([]BlockMap, len(e.blocks))
	for i := range e.blocks {
		b := &e.blocks[i]
		m := BlockMap{
			ID: b.ID, Size: b.Size, PageSize: b.unit(),
			CellPages: 1 << b.heat.shift, Cells: make([]Cell, len(b.heat.cells)),
		}
		for j := range m.Cells {
			from := b.first + uint64(j)<<b.heat.shift
			e.pages.count(from, min(m.CellPages, b.end()-from), &m.Cells[j])
			m.Cells[j].Faulted = b.heat.cells[j].Load()
		}
		all[i] = m
	}
	return all
}

// count adds the states of n pages from page p on. It goes by runs of equal words, because most words of a large VM are
// equal.
func (t *pages) count(p, n uint64, to *Cell) {
	var of [1 << stateBits]uint32
	for end := p + n; p < end; {
		if p%pagesPerWord != 0 || end-p < pagesPerWord {
			of[t.get(p)]++
			p++
			continue
		}
		w, same := alike(t.words[p/pagesPerWord : end/pagesPerWord])
		p += uint64(same) * pagesPerWord
		if s, all := uniform(w); all {
			of[s] += uint32(same) * pagesPerWord
			continue
		}
		for range pagesPerWord {
			of[w&stateMask] += uint32(same)
			w >>= stateBits
		}
	}
	to.add(Cell{
		Missing: of[missing], Asked: of[swept] + of[ahead] + of[installing] + of[revoked], Waited: of[demanded] + of[zeroing],
		Present: of[present] + of[lost], Zero: of[zero],
	})
}

// Coarser joins cells of maps until there are no more than most, or one for each block.
func Coarser(maps []BlockMap, most int) []BlockMap {
	for join := uint64(1); ; join *= 2 {
		cells, coarsest := 0, true
		for i := range maps {
			n := (uint64(len(maps[i].Cells)) + join - 1) / join
			cells += int(n)
			coarsest = coarsest && n == 1
		}
		if cells > most && !coarsest {
			continue
		}
		joined := make([]BlockMap, len(maps))
		for i, m := range maps {
			joined[i] = m
			joined[i].CellPages *= join
			joined[i].Cells = make([]Cell, (uint64(len(m.Cells))+join-1)/join)
			for j, c := range m.Cells {
				joined[i].Cells[uint64(j)/join].add(c)
			}
		}
		return joined
	}
}
