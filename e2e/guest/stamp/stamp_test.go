// SPDX-License-Identifier: Apache-2.0

package stamp

import (
	"fmt"
	"testing"

	"pgregory.net/rapid"
)

var fills = map[string]Fill{"random": Random, "compressible": Compressible, "zero-mix": ZeroMix}

// written finds a page at or after index that is not all zeros in the given generation or in the one before it, so that
// any damage to it changes it.
func written(fill Fill, index, generation uint32) (uint32, *Page) {
	for ; ; index++ {
		var old, p Page
		old.Write(fill, index, generation-1)
		p.Write(fill, index, generation)
		if old != (Page{}) && p != (Page{}) {
			return index, &p
		}
	}
}

func TestWrittenPageChecks(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		fill := Fill(rapid.IntRange(0, int(ZeroMix)).Draw(t, "fill"))
		index, gen := rapid.Uint32().Draw(t, "index"), rapid.Uint32().Draw(t, "generation")
		var p Page
		p.Write(fill, index, gen)
		if w := p.Check(fill, index, gen); w >= 0 {
			t.Fatalf("Check of a fresh page: word %d differs", w)
		}
		for i := range p {
			if got := word(fill, index, gen, i); got != p[i] {
				t.Fatalf("word(%d) = %#x, Write put %#x", i, got, p[i])
			}
		}
	})
}

func TestEachDamageIsFound(t *testing.T) {
	const gen = 9
	damages := []struct {
		want Kind
		do   func(fill Fill, index uint32, p *Page)
	}{
		{Lost, func(_ Fill, _ uint32, p *Page) { clear(p[:]) }},
		{Stale, func(f Fill, i uint32, p *Page) { p.Write(f, i, gen-1) }},
		{Torn, func(f Fill, i uint32, p *Page) { // new head, old tail
			var old Page
			old.Write(f, i, gen-1)
			copy(p[Words/2:], old[Words/2:])
		}},
		{Torn, func(f Fill, i uint32, p *Page) { // old head, new tail
			var old Page
			old.Write(f, i, gen-1)
			copy(p[:Words/2], old[:Words/2])
		}},
		{Torn, func(_ Fill, _ uint32, p *Page) { clear(p[Words/2:]) }},
		{Torn, func(_ Fill, _ uint32, p *Page) { clear(p[:Words/2]) }},
		{Misplaced, func(f Fill, i uint32, p *Page) { _, q := written(f, i+1, gen); *p = *q }},
		{Bitflip, func(_ Fill, _ uint32, p *Page) { p[300] ^= 1 << 17 }},
		{Bitflip, func(_ Fill, _ uint32, p *Page) { p[0] ^= 1 }},
		{Bitflip, func(_ Fill, _ uint32, p *Page) { p[Words-1] ^= 1 << 63 }},
		{Unknown, func(_ Fill, _ uint32, p *Page) { p[100], p[101] = ^p[100], ^p[101] }},
	}
	for name, fill := range fills {
		for i, d := range damages {
			t.Run(fmt.Sprintf("%s/%d-%s", name, i, d.want), func(t *testing.T) {
				index, p := written(fill, 1000, gen)
				good := *p
				d.do(fill, index, p)
				first := p.Check(fill, index, gen)
				if first < 0 {
					t.Fatal("Check found nothing wrong")
				}
				got := p.Explain(fill, index, gen, first)
				want := Damage{Page: index, Word: first, Expected: good[first], Got: p[first], Kind: d.want}
				if got != want {
					t.Errorf("Explain = %+v, want %+v", got, want)
				}
			})
		}
	}
}

func TestZeroPageOfZeroMixMustStayZero(t *testing.T) {
	for index := uint32(0); ; index++ {
		var p Page
		p.Write(ZeroMix, index, 3)
		if p != (Page{}) {
			continue
		}
		p[77] = 1
		if w := p.Check(ZeroMix, index, 3); w != 77 {
			t.Fatalf("Check = %d, want 77", w)
		}
		return
	}
}

func TestZeroMixIsAMix(t *testing.T) {
	zeros := 0
	for index := range uint32(1000) {
		var p Page
		p.Write(ZeroMix, index, 1)
		if p == (Page{}) {
			zeros++
		}
	}
	if zeros < 400 || zeros > 600 {
		t.Errorf("%d of 1000 pages are zero, want about half", zeros)
	}
}

func TestSingleBitFlipIsAlwaysFound(t *testing.T) {
	for name, fill := range fills {
		t.Run(name, func(t *testing.T) {
			index, p := written(fill, 0, 5)
			for i := range p {
				for b := range 64 {
					p[i] ^= 1 << b
					if got := p.Check(fill, index, 5); got != i {
						t.Fatalf("bit %d of word %d flipped: Check = %d", b, i, got)
					}
					p[i] ^= 1 << b
				}
			}
		})
	}
}

func TestTableFindsDamage(t *testing.T) {
	table := make(Table, 64)
	if _, ok := table.Get(0); ok {
		t.Error("Get accepts a zeroed entry")
	}
	for i := range table {
		table.Set(uint32(i), uint32(i)*7)
	}
	if gen, ok := table.Get(5); !ok || gen != 35 {
		t.Fatalf("Get(5) = %d, %v", gen, ok)
	}
	for b := range 64 {
		table[5] ^= 1 << b
		if _, ok := table.Get(5); ok {
			t.Errorf("Get accepts an entry with bit %d flipped", b)
		}
		table[5] ^= 1 << b
	}
	sum := table.Sum(0, 64)
	table[5] = table[6]
	if _, ok := table.Get(5); ok {
		t.Error("Get accepts the entry of another page")
	}
	table.Set(5, 34) // an older, valid entry, which only the sum reveals
	if table.Sum(0, 64) == sum {
		t.Error("Sum does not show a stale entry")
	}
}

func TestCheckAndWriteDoNotAllocate(t *testing.T) {
	p := new(Page)
	if n := testing.AllocsPerRun(100, func() { p.Write(Random, 1, 2); p.Check(Random, 1, 2) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkCheck(b *testing.B) {
	p := new(Page)
	p.Write(Random, 1, 2)
	for b.Loop() {
		p.Check(Random, 1, 2)
	}
}
