// SPDX-License-Identifier: Apache-2.0

package postcopy

import "math/bits"

// A source that is asked for pages in a hole of its memory, or beside one, tells of the rest of that hole, and of holes
// ahead, if the request says that it may (pagewire.Request.Holes, Run.Hole). The VM is stopped there, so that holes
// stay holes. The table takes a hole in by words:
//
//	bulk lane: a run that is a hole ─► each word: one compare-and-swap ─► nobody waits: zero, left as a hole
//	                                                                   └► a thread waits: zeroing, installed at once
//
// A fault, a discard and the answer to a request may come to a page of the hole at the same time. The goroutine that
// changes its state does what is to be done, as everywhere:
//
//	fault first          demanded: the thread waits, and the hole's word has it installed. The answer to the fault's
//	                     request finds the page installed, or being installed, and is dropped
//	hole first           zero: the fault finds a hole and installs a page of zeros itself (claimZero)
//	sweep asked before   swept, or ahead: the hole leaves it to the answer, which is on its way
//	discard              zero either way
//	data came before     installing, present: the hole leaves it as it is
//
// The sweep's requests say that the source may tell of holes. Requests for faults do not, and neither do those for what
// Foresee names, during which the VM stands still.
//
// Each page is asked for where the source does not tell of holes, where pages of zeros have to be installed
// (Block.Populated), and in blocks of gigantic pages, whose parts are put together.

// acceptHole marks a run of zeros that nobody has asked for, and returns how many of its pages were not known before.
// answered is how many bytes the reply has answered for so far. A source may report holes only with an answer on the
// bulk lane, so that it cannot send them unasked.
func (s *session) acceptHole(l *lane, b *block, p, n uint64, answered int64) (news uint64, err error) {
	if l.bulk == nil || answered == 0 {
		return 0, protocolError("a hole of %d pages at %#x of block %d (%s) without an answer",
			n, (p-b.first)<<b.shift, b.index, b.ID)
	}
	if b.Populated || b.gigantic != nil {
		return 0, nil
	}
	known := uint64(0) // news, and the pages that threads wait for: those count as come when they are answered
	defer func() { s.e.pages.hollowed(known) }()
	for end := p + n; p < end; p = wordEnd(p) {
		s.e.at("hole", p)
		marked, waited := s.e.pages.hole(p, end)
		known += marked
		news += marked - uint64(bits.OnesCount16(waited))
		for ; waited != 0; waited &= waited - 1 {
			q := p/pagesPerWord*pagesPerWord + uint64(bits.TrailingZeros16(waited))
			if err := s.e.zero(b, q); err != nil {
				s.e.pages.giveUpZeros(p, waited&(waited-1)) // of q, zero has
				return news, err
			}
			s.e.answered(q)
		}
	}
	return news, nil
}

// wordEnd is the first page behind p's word.
func wordEnd(p uint64) uint64 { return (p/pagesPerWord + 1) * pagesPerWord }

// hole marks the pages of one word, from p on and before end, as zero, and says how many were not known to be zero.
// waited has a bit for each of them that threads wait for, by its place in the word. The caller has to install those as
// zero, then call finishZero or giveUpZero. The caller counts all of them, with hollowed, because to write the counters
// for each word would take longer than the words.
func (t *pages) hole(p, end uint64) (marked uint64, waited uint16) {
	const allZero = uint64(zero) * ones
	w, first := &t.words[p/pagesPerWord], p%pagesPerWord
	last := min(pagesPerWord, first+end-p)
	for {
		old := w.Load()
		switch {
		case old == 0 && last-first == pagesPerWord: // most words of a large hole are so
			if w.CompareAndSwap(0, allZero) {
				return pagesPerWord, 0
			}
			continue
		case old == allZero:
			return 0, 0
		}
		become := old
		marked, waited = 0, 0
		for i := first; i < last; i++ {
			shift := i * stateBits
			to := zero
			switch state(old >> shift & stateMask) {
			case missing:
			case demanded:
				to = zeroing
				waited |= 1 << i
			default:
				continue
			}
			become = become&^(stateMask<<shift) | uint64(to)<<shift
			marked++
		}
		if become == old || w.CompareAndSwap(old, become) {
			return marked, waited
		}
	}
}

// giveUpZeros says that the pages of p's word that waited has a bit for could not be installed. Threads that wait there
// look again in the next Run.
func (t *pages) giveUpZeros(p uint64, waited uint16) {
	for ; waited != 0; waited &= waited - 1 {
		t.giveUpZero(p/pagesPerWord*pagesPerWord + uint64(bits.TrailingZeros16(waited)))
	}
}

// hollowed counts n pages that hole has marked.
func (t *pages) hollowed(n uint64) {
	t.zeros.Add(int64(n))
	t.known(int64(n))
}
