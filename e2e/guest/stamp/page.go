// SPDX-License-Identifier: Apache-2.0

// Package stamp fills memory pages with content that proves where a page belongs and when it was written, and checks
// such pages completely.
//
// A migration engine can damage a guest in few ways: a page is lost and reads as zeros, an old version of it is
// delivered, it is a mixture of two versions, it lands at another page's place, or bits change. A stamp makes each of
// them visible. Every 8-byte word of a page depends on the page's index and on its generation, a number that grows with
// each write. The generation that a page must have is kept apart from it, in a [Table].
//
// The generator is a Weyl sequence with a xor-fold: an addition, a shift and a xor per word. That is weak as a hash and
// strong enough here, because damage is not aimed. It keeps one visit near a microsecond even in a guest whose
// instructions are translated (QEMU's TCG).
package stamp

import "fmt"

// PageSize is the size of a stamped page in bytes.
const PageSize = 4096

// Words is the number of 8-byte words in a page.
const Words = PageSize / 8

// Page is one stamped page. Word 0 names its index and word 1 its generation (both offset by a constant, so that
// neither is zero); the other words follow from these two.
type Page [Words]uint64

// Fill is how page content looks to a compressor. All fills detect the same damage, except as [ZeroMix] says.
type Fill uint8

const (
	// Random has no repetition within a page: it does not compress.
	Random Fill = iota
	// Compressible repeats a period of 16 words.
	Compressible
	// ZeroMix makes about half of all (page, generation) pairs an all-zero page, and the others random. A lost page that
	// should be zero anyway is no damage and is not reported.
	ZeroMix
)

// ParseFill reads the name of a fill: random, compressible or zero-mix.
func ParseFill(name string) (Fill, error) {
	switch name {
	case "random":
		return Random, nil
	case "compressible":
		return Compressible, nil
	case "zero-mix":
		return ZeroMix, nil
	}
	return 0, fmt.Errorf("unknown fill %q: one of random, compressible, zero-mix", name)
}

const (
	golden     = 0x9e3779b97f4a7c15 // 2^64 / golden ratio, odd
	indexMagic = 0x6d69_6772_0000_0000
	genMagic   = 0x7374_616d_0000_0000
	period     = 16 // words, of Compressible
	headWords  = 2
)

// mix is the finalizer of splitmix64: each input bit reaches each output bit.
func mix(x uint64) uint64 {
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// sequence returns where the words of an (index, generation) pair start and how far apart the terms of their Weyl
// sequence are.
func sequence(index, generation uint32) (start, step uint64) {
	start = mix(uint64(index)<<32 | uint64(generation) + golden)
	return start, mix(start) | 1
}

func isZero(fill Fill, start uint64) bool { return fill == ZeroMix && start&1 == 0 }

// Write stamps p as the given generation of page index.
func (p *Page) Write(fill Fill, index, generation uint32) {
	start, step := sequence(index, generation)
	if isZero(fill, start) {
		clear(p[:])
		return
	}
	p[0] = indexMagic | uint64(index)
	p[1] = genMagic | uint64(generation)
	x := start
	for i := headWords; i < Words; i++ {
		if fill == Compressible && i%period == 0 {
			x = start
		}
		x += step
		p[i] = x ^ x>>29
	}
}

// word returns word i of the given stamp, the same that Write puts there. It is for the rare path that explains damage.
func word(fill Fill, index, generation uint32, i int) uint64 {
	start, step := sequence(index, generation)
	switch {
	case isZero(fill, start):
		return 0
	case i == 0:
		return indexMagic | uint64(index)
	case i == 1:
		return genMagic | uint64(generation)
	}
	terms := uint64(i - headWords + 1)
	if fill == Compressible && i >= period {
		terms = uint64(i%period + 1)
	}
	x := start + terms*step
	return x ^ x>>29
}

// Check compares every word of p with the stamp that it must hold. It returns the first word that differs, or -1. It
// does not write and does not allocate.
func (p *Page) Check(fill Fill, index, generation uint32) int {
	start, step := sequence(index, generation)
	if isZero(fill, start) {
		for i, w := range p {
			if w != 0 {
				return i
			}
		}
		return -1
	}
	if p[0] != indexMagic|uint64(index) {
		return 0
	}
	if p[1] != genMagic|uint64(generation) {
		return 1
	}
	x := start
	for i := headWords; i < Words; i++ {
		if fill == Compressible && i%period == 0 {
			x = start
		}
		x += step
		if p[i] != x^x>>29 {
			return i
		}
	}
	return -1
}
