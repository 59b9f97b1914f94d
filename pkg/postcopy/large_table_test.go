// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"sync/atomic"
	"testing"
	"unsafe"

	"pgregory.net/rapid"
)

// TestLargeTables: methods that go through a table by words give the same as going through it by pages.
func TestLargeTables(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		words := rapid.IntRange(1, 6).Draw(t, "words")
		memory := make([]byte, words*wordSize)
		table := unsafe.Slice((*atomic.Uint64)(unsafe.Pointer(&memory[0])), words)
		var states []state
		for i := range words {
			word := uint64(0)
			same := rapid.Bool().Draw(t, "same")
			all := state(rapid.IntRange(0, int(revoked)).Draw(t, "state"))
			for j := range pagesPerWord {
				s := all
				if !same {
					s = state(rapid.IntRange(0, int(revoked)).Draw(t, "state"))
				}
				states = append(states, s)
				word |= uint64(s) << (j * stateBits)
			}
			table[i].Store(word)
		}
		n := uint64(rapid.IntRange((words-1)*pagesPerWord+1, words*pagesPerWord).Draw(t, "pages"))
		var left, zeros, gone, unsure int64
		firstSwept, sweeps := uint64(0), false
		for i := n; i < uint64(len(states)); i++ {
			if states[i] == swept { // behind the last page
				states[i] = present
				w := &table[i/pagesPerWord]
				w.Store(w.Load()&^(stateMask<<(i%pagesPerWord*stateBits)) | uint64(present)<<(i%pagesPerWord*stateBits))
			}
		}
		for i, s := range states {
			if s == swept && !sweeps {
				firstSwept, sweeps = uint64(i), true
			}
		}
		if p, found := (&pages{words: table}).firstSwept(); found != sweeps || p != firstSwept {
			t.Fatalf("the first swept page is %d, %v, want %d, %v", p, found, firstSwept, sweeps)
		}
		for _, s := range states[:n] {
			switch s {
			case missing, swept, ahead, demanded:
				left++
			case installing:
				left++
				unsure++
			case zeroing, revoked:
				zeros++
				unsure++
			case zero:
				zeros++
			case lost:
				gone++
			}
		}
		p, _, err := newPages([]uint64{n}, memory)
		if err != nil {
			t.Fatal(err)
		}
		if p.left.Load() != left || p.zeros.Load() != zeros || p.lost.Load() != gone || p.unsure.Load() != unsure {
			t.Fatalf("of %v: left %d, zeros %d, lost %d, unsure %d",
				states[:n], p.left.Load(), p.zeros.Load(), p.lost.Load(), p.unsure.Load())
		}
		for i := range n {
			if s := p.get(i); s == swept || s == ahead || s == demanded || s == installing || s == zeroing || s == revoked {
				t.Fatalf("page %d is in state %d when the table is taken up", i, s)
			}
		}
	})
}

// BenchmarkLargeTable measures what goes through the whole table of a VM of 1 TiB: putBack, taking up, Map, and the
// sweep's search for the last page.
func BenchmarkLargeTable(b *testing.B) {
	const pages = 1 << 40 / 4096
	memory := make([]byte, pages/pagesPerWord*wordSize)
	p, _, err := newPages([]uint64{pages}, memory)
	if err != nil {
		b.Fatal(err)
	}
	for i := range p.words {
		p.words[i].Store(uint64(zero) * ones)
	}
	p.words[len(p.words)/2].Store(0)
	b.Run("put back", func(b *testing.B) {
		for b.Loop() {
			p.putBack()
		}
	})
	b.Run("take up", func(b *testing.B) {
		for b.Loop() {
			if _, _, err := newPages([]uint64{pages}, memory); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("map", func(b *testing.B) {
		for b.Loop() {
			var c Cell
			for at := uint64(0); at < pages; at += pages / MostCells {
				p.count(at, pages/MostCells, &c)
			}
			if c.Zero != pages-pagesPerWord || c.Missing != pagesPerWord {
				b.Fatal(c)
			}
		}
	})
	b.Run("next missing", func(b *testing.B) {
		for b.Loop() {
			if at, found := p.nextMissing(0); !found || at != uint64(len(p.words)/2)*pagesPerWord {
				b.Fatal(at, found)
			}
		}
	})
}
