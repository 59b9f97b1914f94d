// SPDX-License-Identifier: Apache-2.0

package stamp

import "math/bits"

// Kind is a guess at what happened to a page. The damage itself is certain; its kind is what the content looks like.
type Kind string

const (
	// Lost: the page reads as zeros.
	Lost Kind = "lost"
	// Stale: the page is whole, in an older generation.
	Stale Kind = "stale"
	// Ahead: the page is whole, in a newer generation than the table has, so the table is stale.
	Ahead Kind = "ahead"
	// Misplaced: the page is whole, but it is another page.
	Misplaced Kind = "misplaced"
	// Torn: parts of the page are from another generation, or are zeros.
	Torn Kind = "torn"
	// Bitflip: one word differs, in one or two bits.
	Bitflip Kind = "bitflip"
	// BadTable: the table's entry, or the sum of its entries, is damaged.
	BadTable Kind = "table"
	// Unknown is none of these.
	Unknown Kind = "unknown"
)

// Damage says what is wrong with one page.
type Damage struct {
	Page     uint32 // index
	Word     int    // first word that differs
	Expected uint64
	Got      uint64
	Kind     Kind
}

// tornDepth is how many generations back and ahead Explain looks for the origin of a torn part.
const tornDepth = 64

// Explain describes the difference between p and the stamp that it must hold. first is the result of Check.
func (p *Page) Explain(fill Fill, index, generation uint32, first int) Damage {
	return Damage{
		Page:     index,
		Word:     first,
		Expected: word(fill, index, generation, first),
		Got:      p[first],
		Kind:     p.kind(fill, index, generation, first),
	}
}

func (p *Page) kind(fill Fill, index, generation uint32, first int) Kind {
	if *p == (Page{}) {
		return Lost
	}
	if i, g, ok := p.header(); ok && p.Check(fill, i, g) < 0 {
		switch {
		case i != index:
			return Misplaced
		case g < generation:
			return Stale
		default:
			return Ahead
		}
	}
	wrong, zeros, flipped := 0, 0, 0
	for i, got := range p {
		want := word(fill, index, generation, i)
		if got == want {
			continue
		}
		wrong++
		if got == 0 {
			zeros++
		}
		flipped += bits.OnesCount64(got ^ want)
	}
	switch {
	case wrong == 1 && flipped <= 2:
		return Bitflip
	case zeros == wrong && wrong > 1:
		return Torn
	case p.isTorn(fill, index, generation, first):
		return Torn
	}
	return Unknown
}

// header reads which stamp the page claims to be.
func (p *Page) header() (index, generation uint32, ok bool) {
	const high = 0xffff_ffff_0000_0000
	return uint32(p[0]), uint32(p[1]), p[0]&high == indexMagic && p[1]&high == genMagic
}

// isTorn reports whether the first wrong word belongs to another generation of the same page.
func (p *Page) isTorn(fill Fill, index, generation uint32, first int) bool {
	for d := uint32(1); d <= tornDepth; d++ {
		if d <= generation && word(fill, index, generation-d, first) == p[first] {
			return true
		}
		if word(fill, index, generation+d, first) == p[first] {
			return true
		}
	}
	return false
}
