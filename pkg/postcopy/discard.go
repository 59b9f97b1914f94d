// SPDX-License-Identifier: Apache-2.0

package postcopy

// A balloon, free page reporting or virtio-mem discards pages (UFFD_EVENT_REMOVE). The process waits until the event is
// read, then drops the page. The worker that reads the event marks the page zero, so that content in flight is dropped
// when it comes, and wakes the threads that wait for it. If content is being put into the page at that moment, the page
// stays its installer's (revoked). The installer looks once more before each UFFDIO_COPY. Neither waits for the other:
// no reader for a copy of 512 KiB, no copy for a reader.
//
// So content can land after the drop all the same, when the event is read between an installer's look and its
// UFFDIO_COPY. The page then holds what it held at the source, as if it had not been given up. That is not wrong, for
// these reasons:
//
//   - Such a page has not been touched here since the switch, or it would have been there. What it holds is what the
//     guest left in it, never another's, and never older than something that the guest has written here.
//   - The content of such pages is undefined: a balloon's (virtio 1.2, 5.5.6), and virtio-mem's (5.15.6). A guest that
//     relies on zeros nevertheless, because it clears what it frees (init_on_free=1) before it reports it, has cleared
//     it at the source.
//   - What it writes after that stays: as long as the page is its installer's, nobody else maps it, and when it has
//     come, it is never installed a second time.
//
// QEMU 7.2 punches a hole into the RAM file before it discards (ram_block_discard_range), and for huge pages does not
// discard in a way that makes an event: content that was in flight may then come back, as above.
//
// The process may be killed at any point of it; the next engine of the same state finds
//
//	the event not read        it is still there, and the process waits in madvise(2); all copies are refused (EAGAIN)
//	                          until it is read
//	read, not or half marked  pages that are missing: they come from the source, see above. Of one that was being
//	                          installed the kernel's answer says whether it came (copies.go)
//	marked                    they are zero
//	a copy done, not marked   what the kernel answered is kept, and says that the page was there (copies.go)
//	a page that was there     present: its hole, by whichever call, reads as zero. The fault on it is answered by a
//	                          zero page (refill), which is refused as long as an event is not read, and then comes again

// discard says that the process gave up n pages from p on. Pages that are not there yet are zero now, or revoked. It
// goes by words: a DIMM that is unmapped is large, and an installer does not wait for long until its pages are marked.
func (t *pages) discard(p, n uint64) {
	gone := int64(0)
	for end := p + n; p < end; p = wordEnd(p) {
		gone += t.discardWord(p, end)
	}
	t.known(gone)
}

// discardWord discards the pages of one word, from p on and before end. It returns how many were not known before.
func (t *pages) discardWord(p, end uint64) (gone int64) {
	w, first := &t.words[p/pagesPerWord], p%pagesPerWord
	last := min(pagesPerWord, first+end-p)
	for {
		old := w.Load()
		if s, all := uniform(old); all && (s == zero || s == present) {
			return 0
		}
		become, wasLost := old, int64(0)
		gone = 0
		for i := first; i < last; i++ {
			shift := i * stateBits
			to := zero
			switch state(old >> shift & stateMask) {
			case missing, swept, ahead, demanded:
				gone++
			case installing:
				to = revoked
			case lost: // it was known already
				wasLost++
			default:
				continue
			}
			become = become&^(stateMask<<shift) | uint64(to)<<shift
		}
		if w.CompareAndSwap(old, become) {
			if wasLost > 0 {
				t.lost.Add(-wasLost)
				t.zeros.Add(wasLost)
			}
			return gone
		}
	}
}
