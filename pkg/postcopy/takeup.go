// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"errors"
	"fmt"

	"github.com/migrated-vm/migrated/pkg/uffd"
)

// takeUp counts the n pages of a block from page p on, which is the first of a word, and puts back what was under way
// when an earlier process ended. Whether a page that was being installed is there, the kernel's answer says
// (copies.go).
func (t *pages) takeUp(p, n uint64) error {
	for i, end := p, p+n; i < end; {
		if i%pagesPerWord == 0 && end-i >= pagesPerWord {
			words := t.words[i/pagesPerWord : end/pagesPerWord]
			if s, all := uniform(words[0].Load()); all {
				if _, n := alike(words); t.tally(s, int64(n*pagesPerWord)) {
					i += uint64(n * pagesPerWord)
					continue
				}
			}
		}
		switch s := t.get(i); s {
		case swept, ahead, demanded, installing:
			t.swap(i, s, missing)
			t.left.Add(1)
			if s == installing {
				t.unsure.Add(1)
			}
		case zeroing, revoked:
			t.swap(i, s, zero)
			t.zeros.Add(1)
			t.unsure.Add(1)
		default:
			if !t.tally(s, 1) {
				return fmt.Errorf("%w: page %d of the table has state %d", ErrState, i, s)
			}
		}
		i++
	}
	for i := p + n; i%pagesPerWord != 0; i++ { // places without a page are never missing
		t.swap(i, missing, present)
	}
	return nil
}

// tally counts n pages in a state in which nothing is under way, and says false of any other.
func (t *pages) tally(s state, n int64) bool {
	switch s {
	case missing:
		t.left.Add(n)
	case zero:
		t.zeros.Add(n)
	case lost:
		t.lost.Add(n)
	case present:
	default:
		return false
	}
	return true
}

// landed says that n pages from page p on are there. Their installer ended before it could say so, and takeUp has put
// them back. In no other way can a page be there and yet be missing in the table: finish comes before the installer's
// next copy.
func (t *pages) landed(p, n uint64) {
	done := int64(0)
	for i := range n {
		if t.swap(p+i, missing, present) {
			done++
		}
	}
	t.unsure.Add(-done)
	t.known(done)
}

// areUnmapped says of a block that an earlier engine had registered, and that the kernel has now refused as invalid,
// whether the process has unmapped what is missing of it: a DIMM was unplugged, and perhaps nobody has read the event
// yet. Memory of the VM that is still there can be registered again, so each missing page is tried. If nothing had come
// of any block, it is not known that the block was ever registered: do not call it then.
func (t *pages) areUnmapped(b *block) bool {
	if b.UFFD.Wake(b.all()) != nil { // the kernel refuses everything before the handshake
		return false
	}
	for p := b.first; p < b.end(); p++ {
		if t.get(p) != missing {
			continue
		}
		whole := uffd.Range{Start: b.addr(p) &^ (b.PageSize - 1), Len: b.PageSize}
		if _, err := b.UFFD.Register(whole, uffd.ModeMissing); !errors.Is(err, uffd.ErrInvalid) {
			return false
		}
	}
	return true
}
