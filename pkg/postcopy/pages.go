// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"fmt"
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
//	 finish │  │         ┌───────► zeroing          exactly one installer, of zeros
//	        │  └──► zero ┘ claimFault  │
//	        ▼       (hole)             │ finishZero
//	     present ◄─────────────────────┘
//
// A fault on a swept page asks for it once more, on a demand lane, because the bulk lane may be far behind; one on a page
// ahead does not. discard (the process gave the page up) makes zero of missing, swept, ahead, demanded and
// installing. An installer that cannot go on puts installing back to missing, zeroing back to zero; the next Run puts
// back swept, ahead and demanded. Nothing leaves present: a page that is discarded later reads as zero by itself.
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
)

const (
	stateBits    = 4
	wordSize     = 8 // bytes
	pagesPerWord = 8 * wordSize / stateBits
	stateMask    = 1<<stateBits - 1
)

// pages is the page table: the state of every page of all blocks, by global page number. All states change
// here and nowhere else, each by one atomic compare-and-swap.
type pages struct {
	words []atomic.Uint64

	// left counts the pages that are not known yet: all but present, zero and zeroing. It never rises.
	left atomic.Int64
	// zeros counts the pages that came as zero.
	zeros atomic.Int64
	// unsure is how many pages an earlier process may have installed without saying so, less those that turned out so.
	unsure atomic.Int64
	// full is closed when left reaches zero.
	full chan struct{}
}

// newPages makes a table for blocks of so many pages; each begins at the word after the one before, at the
// numbers returned. memory is where it is kept, see Options.State; nil: nowhere that matters.
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

// takeUp counts the n pages of a block from page p on, and puts back what was under way when an earlier process
// ended: whether a page that was being installed is there the kernel has said (copies.go).
func (t *pages) takeUp(p, n uint64) error {
	for i := p; i < p+n; i++ {
		switch s := t.get(i); s {
		case missing:
			t.left.Add(1)
		case swept, ahead, demanded, installing:
			t.swap(i, s, missing)
			t.left.Add(1)
			if s == installing {
				t.unsure.Add(1)
			}
		case zeroing:
			t.swap(i, zeroing, zero)
			t.zeros.Add(1)
			t.unsure.Add(1)
		case zero:
			t.zeros.Add(1)
		case present:
		default:
			return fmt.Errorf("%w: page %d of the table has state %d", ErrState, i, s)
		}
	}
	for i := p + n; i%pagesPerWord != 0; i++ { // what no page has is never missing
		t.swap(i, missing, present)
	}
	return nil
}

// landed says that n pages from page p on are there, whose installer ended before it could say so; takeUp has put them
// back. Nothing else leaves a page missing that is there: finish comes before the installer's next copy.
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
	claimRequest claim = iota // the page is the caller's to ask for
	claimAgain                // the same, but the sweep has asked for it before: whichever answer comes first
	claimWait                 // it was asked for ahead, and is waited for from now on
	claimNothing              // it is waited for already or being installed; who installs it wakes the thread
	claimZero                 // it is the caller's to install as zero, then finishZero or giveUpZero
	claimPresent              // it should be there
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
		default:
			return claimNothing
		}
	}
}

// claimAhead claims a missing page that is to be asked for on a demand lane before a thread waits for it.
func (t *pages) claimAhead(p uint64) bool { return t.swap(p, missing, ahead) }

// nextMissing finds the first missing page at or after page from, going on from the beginning at the end.
func (t *pages) nextMissing(from uint64) (uint64, bool) {
	const ones = 0x1111111111111111
	n := uint64(len(t.words))
	start := from / pagesPerWord % n
	before := uint64(1)<<(from%pagesPerWord*stateBits) - 1 // pages before from look as if not missing
	for i := uint64(0); i <= n; i++ {
		word := (start + i) % n
		w := t.words[word].Load() | before
		before = 0
		// The lowest bit that stays is in the lowest state that is 0.
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

// arrival is what a receiver has to do with a page that came.
type arrival uint8

const (
	arrivalInstall arrival = iota // it is the caller's to install, then finish or giveUp (zeros: finishZero or giveUpZero)
	arrivalDrop                   // nothing: it is known, or somebody else installs it
	arrivalUnasked                // nobody has asked for it
)

// arrive decides about a page whose bytes came.
func (t *pages) arrive(p uint64) arrival {
	for {
		switch s := t.get(p); s {
		case swept, ahead, demanded:
			if t.swap(p, s, installing) {
				return arrivalInstall
			}
		case missing:
			return arrivalUnasked
		default:
			return arrivalDrop
		}
	}
}

// arriveZero decides about a page that came as zero. It is known from then on.
func (t *pages) arriveZero(p uint64) arrival {
	for {
		switch s := t.get(p); s {
		case swept, ahead:
			if t.swap(p, s, zero) {
				t.zeros.Add(1)
				t.known(1)
				return arrivalDrop
			}
		case demanded:
			if t.swap(p, demanded, zeroing) {
				t.zeros.Add(1)
				t.known(1)
				return arrivalInstall
			}
		case missing:
			return arrivalUnasked
		default:
			return arrivalDrop
		}
	}
}

// stillInstalling says how many of the n pages from p on are still the installer's: a discard may have taken one away.
func (t *pages) stillInstalling(p, n uint64) (k uint64) {
	for k < n && t.get(p+k) == installing {
		k++
	}
	return k
}

// finish says that n pages from p on are there.
func (t *pages) finish(p, n uint64) {
	done := int64(0)
	for i := range n {
		if t.swap(p+i, installing, present) {
			done++
		}
	}
	t.known(done)
}

// giveUp says that n pages from p on could not be installed.
func (t *pages) giveUp(p, n uint64) {
	for i := range n {
		t.swap(p+i, installing, missing)
	}
}

// holes says that n pages from p on, whose bytes came and were zero, are to be left as holes.
func (t *pages) holes(p, n uint64) {
	done := int64(0)
	for i := range n {
		if t.swap(p+i, installing, zero) {
			done++
		}
	}
	t.zeros.Add(done)
	t.known(done)
}

// fillHoles says that those of n pages from p on that read as zero have been installed as that.
func (t *pages) fillHoles(p, n uint64) {
	for i := range n {
		t.swap(p+i, zero, present)
	}
}

func (t *pages) finishZero(p uint64) { t.swap(p, zeroing, present) }
func (t *pages) giveUpZero(p uint64) { t.swap(p, zeroing, zero) }

// discard says that the process gave up n pages from p on. What is not there yet is zero now.
func (t *pages) discard(p, n uint64) {
	gone := int64(0)
	for i := range n {
		for {
			s := t.get(p + i)
			if s != missing && s != swept && s != ahead && s != demanded && s != installing {
				break
			}
			if t.swap(p+i, s, zero) {
				gone++
				break
			}
		}
	}
	t.known(gone)
}

// putBack forgets what was asked for. No installer may be at work.
func (t *pages) putBack() {
	for i := range t.words {
		for p := uint64(i) * pagesPerWord; t.words[i].Load() != 0 && p < uint64(i+1)*pagesPerWord; p++ {
			if s := t.get(p); s == swept || s == ahead || s == demanded {
				t.swap(p, s, missing)
			}
		}
	}
}

// firstSwept finds a page that the sweep has asked for.
func (t *pages) firstSwept() (uint64, bool) {
	for p := range uint64(len(t.words)) * pagesPerWord {
		if t.get(p) == swept {
			return p, true
		}
	}
	return 0, false
}
