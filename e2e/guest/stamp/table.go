// SPDX-License-Identifier: Apache-2.0

package stamp

// Table holds the generation that each page must have. It is in the same guest memory as the pages, so it is as much at
// risk as they are. Each entry has a check of its own position and value, and the owner keeps the sum of all
// generations in another page (see [Table.Sum]). So a table page that went back in time is noticed even if the pages
// that it describes went back with it.
//
// The zero value of an entry is not valid, so that a lost table page is noticed.
type Table []uint64

func entryCheck(index, generation uint32) uint32 {
	return uint32(mix(uint64(generation)<<32|uint64(index))) | 1
}

// Set records the generation of page index.
func (t Table) Set(index, generation uint32) {
	t[index] = uint64(entryCheck(index, generation))<<32 | uint64(generation)
}

// Get returns the generation of page index; ok is false if the entry is damaged.
func (t Table) Get(index uint32) (generation uint32, ok bool) {
	e := t[index]
	generation = uint32(e)
	return generation, uint32(e>>32) == entryCheck(index, generation)
}

// Sum adds up the generations of pages [from, to).
func (t Table) Sum(from, to uint32) uint64 {
	var sum uint64
	for i := from; i < to; i++ {
		sum += uint64(uint32(t[i]))
	}
	return sum
}
