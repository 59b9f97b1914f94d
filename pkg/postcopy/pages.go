// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"fmt"
	"iter"
	"math/bits"
	"sync/atomic"
	"unsafe"
)

// state is what is known about one page.
//
//	                 claimSweep, claimAhead
//	        ┌──────── missing ────────┐ claimFault
//	        ▼                         ▼
//	  swept, ahead ─────────────► demanded         asked for: nobody waits / a thread waits for it
//	        │  │   claimFault     │    │
//	arrival │  │ zero arrival     │    │ zero arrival
//	        ▼  │                  ▼    │
//	   installing ◄───────────────┘    │           exactly one installer
//	        │  │                       ▼
//	        │  │ revoked           ▼
//	 finish │  │    │    ┌───────► zeroing          exactly one installer, of zeros
//	        │  └────┴► zero ┘ claimFault │
//	        ▼         (hole)             │ finishZero
//	     present ◄───────────────────────┘
//
// The source may tell of a hole without being asked for it. Then missing pages become zero, and demanded pages become
// zeroing (holes.go).
//
// A page that the source has lost goes from installing to lost. A thread that touches it gets SIGBUS, as with broken
// memory.
//
// A fault on a swept page asks for it once more, on a demand lane, because the bulk lane may be far behind. A fault on
// a page that is ahead does not. discard (the process gave the page up) turns missing, swept, ahead and demanded into
// zero. A page that is being installed stays its installer's: discard turns it into revoked, and the installer turns
// that into zero, or into present if it has put the page in already. An installer that cannot go on puts installing
// back to missing, and zeroing back to zero. The next Run puts back swept, ahead and demanded. Nothing leaves present:
// a page that is discarded later reads as zero by itself.
//
// The numbers are a format: a table may outlive the process (Options.State) and be taken up by a newer one.
type state uint8

const (
	missing    state = iota
	swept            // asked for on the bulk lane
	demanded         // asked for on a demand lane, and a thread waits for it
	installing       // its bytes are being installed
	present          // it is there, installed by us (or, EEXIST, by somebody else: others.go)
	zero             // it reads as zero when unregistered: a hole, left as one so that a sparse VM stays sparse
	zeroing          // a zero page is being installed, because a thread waits in the hole
	ahead            // asked for on a demand lane before a thread waits for it
	lost             // the source could not read it: it is poisoned
	revoked          // the process gave it up while it was being installed; its installer still holds it
)

const (
	stateBits    = 4
	wordSize     = 8 // bytes
	pagesPerWord = 8 * wordSize / stateBits
	stateMask    = 1<<stateBits - 1
	ones         = 0x1111111111111111 // 1 for each page of a word
)

// pages is the page table: the state of every page of all blocks, by global page number. States change nowhere but
// in its methods, each by one atomic compare-and-swap.
type pages struct {
	words []atomic.Uint64

	// left counts the pages that are not known yet: all but present, zero and zeroing. It never rises.
	left atomic.Int64
	// zeros counts the pages that came as zero.
	zeros atomic.Int64
	// lost counts the lost pages.
	lost atomic.Int64
	// unsure is how many pages an earlier process may have installed without saying so, less those that turned out to be
	// installed.
	unsure atomic.Int64
	// full is closed when left reaches zero.
	full chan struct{}
}

// newPages makes a table for blocks of these numbers of pages, and returns the number of the first page of each. A
// block begins at a new word. The table is kept in memory, see Options.State; nil: in memory of its own.
func newPages(blocks []uint64, memory []byte) (*pages, []uint64, error) {
	t := &pages{full: make(chan struct{})}
	first := make([]uint64, len(blocks))
	words := uint64(0)
	for i, n := range blocks {
		first[i] = words * pagesPerWord
		words += wordsFor(n)
	}
	switch {
	case memory == nil:
		t.words = make([]atomic.Uint64, words)
	case uint64(len(memory)) != words*wordSize || uintptr(unsafe.Pointer(&memory[0]))%wordSize != 0:
		return nil, nil, fmt.Errorf("%w: %d bytes instead of %d, or not aligned", ErrState, len(memory), words*wordSize)
	default:
		t.words = unsafe.Slice((*atomic.Uint64)(unsafe.Pointer(&memory[0])), words)
	}
	for i, n := range blocks {
		if err := t.takeUp(first[i], n); err != nil {
			return nil, nil, err
		}
	}
	if t.left.Load() == 0 {
		close(t.full)
	}
	return t, first, nil
}

// uniform says whether all pages of a word are in one state, and in which.
func uniform(word uint64) (s state, all bool) {
	s = state(word & stateMask)
	return s, word == uint64(s)*ones
}

// alike returns the first word, and how many words from there on are equal to it. In a large VM most are.
func alike(words []atomic.Uint64) (word uint64, n int) {
	word, n = words[0].Load(), 1
	for n < len(words) && words[n].Load() == word {
		n++
	}
	return word, n
}

func wordsFor(pages uint64) uint64 { return (pages + pagesPerWord - 1) / pagesPerWord }

func (t *pages) get(p uint64) state {
	return state(t.words[p/pagesPerWord].Load() >> (p % pagesPerWord * stateBits) & stateMask)
}

// swap changes the state of page p if it is from.
func (t *pages) swap(p uint64, from, to state) bool {
	w, shift := &t.words[p/pagesPerWord], p%pagesPerWord*stateBits
	for {
		old := w.Load()
		if state(old>>shift&stateMask) != from {
			return false
		}
		if w.CompareAndSwap(old, old&^(stateMask<<shift)|uint64(to)<<shift) {
			return true
		}
	}
}

// known counts n pages as present or zero.
func (t *pages) known(n int64) {
	if n > 0 && t.left.Add(-n) == 0 {
		close(t.full)
	}
}

// claim is what a fault worker has to do about a fault.
type claim uint8

const (
	claimRequest claim = iota // the caller is to ask for the page
	claimAgain                // the same, but the sweep has asked for it before; the answer that comes first counts
	claimWait                 // it was asked for ahead, and is waited for from now on
	claimNothing              // it is waited for already or being installed; its installer wakes the thread
	claimZero                 // the caller is to install it as zero, then finishZero or giveUpZero
	claimPresent              // it should be there
	claimLost                 // it is lost
	claims                    // how many there are
)

// claimFault decides about a fault on page p.
func (t *pages) claimFault(p uint64) claim {
	for {
		switch s := t.get(p); s {
		case missing:
			if t.swap(p, missing, demanded) {
				return claimRequest
			}
		case swept:
			if t.swap(p, swept, demanded) {
				return claimAgain
			}
		case ahead:
			if t.swap(p, ahead, demanded) {
				return claimWait
			}
		case zero:
			if t.swap(p, zero, zeroing) {
				return claimZero
			}
		case present:
			return claimPresent
		case lost:
			return claimLost
		default:
			return claimNothing
		}
	}
}

// isWaitedFor reports whether a thread waits for page p or it is being installed. Its installer then ends the time of
// its fault, after it has changed the state.
func (t *pages) isWaitedFor(p uint64) bool {
	switch t.get(p) {
	case demanded, installing, revoked, zeroing:
		return true
	}
	return false
}

// claimAhead claims a missing page that is to be asked for on a demand lane before a thread waits for it.
func (t *pages) claimAhead(p uint64) bool { return t.swap(p, missing, ahead) }

// nextMissing finds the first missing page at or after page from, going on from the beginning at the end.
func (t *pages) nextMissing(from uint64) (uint64, bool) {
	n := uint64(len(t.words))
	start := from / pagesPerWord % n
	before := uint64(1)<<(from%pagesPerWord*stateBits) - 1 // makes the pages before from look as if they were not missing
	for i := uint64(0); i <= n; i++ {
		word := (start + i) % n
		w := t.words[word].Load() | before
		before = 0
		// The lowest bit that is left is in the lowest state that is 0.
		if found := (w - ones) &^ w & (ones << (stateBits - 1)); found != 0 {
			return word*pagesPerWord + uint64(bits.TrailingZeros64(found))/stateBits, true
		}
	}
	return 0, false
}

// claimSweep claims missing pages from page p on, at most limit, and says how many.
func (t *pages) claimSweep(p, limit uint64) (n uint64) {
	for n < limit && t.swap(p+n, missing, swept) {
		n++
	}
	return n
}

// putBack makes pages that were asked for missing again. No installer may be at work.
func (t *pages) putBack() {
	for p, s := range t.each(swept, ahead, demanded) {
		t.swap(p, s, missing)
	}
}

// firstSwept finds a page that the sweep has asked for.
func (t *pages) firstSwept() (first uint64, found bool) {
	for p := range t.each(swept) {
		return p, true
	}
	return 0, false
}

// each goes through the pages that are in one of these states, a word at a time: a large table is mostly full, or
// empty.
func (t *pages) each(states ...state) iter.Seq2[uint64, state] {
	wanted := [1 << stateBits]bool{}
	for _, s := range states {
		wanted[s] = true
	}
	return func(yield func(uint64, state) bool) {
		for i := range t.words {
			word := t.words[i].Load()
			if s, all := uniform(word); all && !wanted[s] {
				continue
			}
			for p := uint64(i) * pagesPerWord; p < uint64(i+1)*pagesPerWord; p++ {
				if s := state(word & stateMask); wanted[s] && !yield(p, s) {
					return
				}
				word >>= stateBits
			}
		}
	}
}
