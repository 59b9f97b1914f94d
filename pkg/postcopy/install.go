// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"errors"
	"fmt"
	"runtime"
	"time"

	"github.com/migrated-vm/migrated/pkg/pagewire"
	"github.com/migrated-vm/migrated/pkg/uffd"
)

// accept is step 5 for one reply: it installs or marks each page, and settles what the lane was asked for.
func (s *session) accept(l *lane) error {
	data, asked := l.reply.Data, l.asked.Load()
	answered, pages := int64(0), uint64(0)
	for _, r := range l.reply.Runs {
		b, p, n, err := s.e.locate(r)
		if err != nil {
			return err
		}
		if r.Hole {
			n, err := s.acceptHole(l, b, p, n, answered)
			if err != nil {
				return err
			}
			pages += n
			continue
		}
		if answered += int64(r.Length); answered > asked {
			return protocolError("pages of block %d (%s) at %#x that nobody asked for", r.Block, b.ID, r.Offset)
		}
		switch {
		case r.Lost:
			err = s.acceptLost(l.record, b, p, n)
		case b.gigantic != nil:
			n := uint64(0)
			if !r.Zero {
				n = uint64(r.Length)
			}
			err = s.acceptParts(l.record, b, p, uint64(r.Length)>>b.shift, data[:n])
			data = data[n:]
		case r.Zero && b.Populated:
			err = s.acceptFilled(l.record, b, p, n)
		case r.Zero:
			err = s.acceptZeros(b, p, n)
		default:
			err = s.acceptData(l.record, b, p, n, data[:r.Length])
			data = data[r.Length:]
		}
		if err != nil {
			return err
		}
		pages += n
	}
	l.pages.Add(pages)
	l.bytes.Add(uint64(l.reply.Carried()))
	s.e.counters.pageBytes.Add(uint64(len(l.reply.Data)))
	l.asked.Add(-answered)
	if l.bulk != nil {
		s.answered(l, answered, int64(len(l.reply.Data)), int64(l.reply.Carried()))
	}
	return nil
}

// locate turns a run into pages, or refuses it.
func (e *Engine) locate(r pagewire.Run) (b *block, p, n uint64, err error) {
	if r.Block >= uint32(len(e.blocks)) {
		return nil, 0, 0, protocolError("a page of block %d, there are %d", r.Block, len(e.blocks))
	}
	b = &e.blocks[r.Block]
	length := uint64(r.Length)
	switch {
	case length == 0 || length%b.unit() != 0 || r.Offset%b.unit() != 0:
		return nil, 0, 0, protocolError("%d bytes at %#x of block %d (%s) are not whole pages of %d bytes",
			length, r.Offset, r.Block, b.ID, b.unit())
	case r.Offset > b.Size || length > b.Size-r.Offset:
		return nil, 0, 0, protocolError("%d bytes at %#x exceed block %d (%s) of %#x bytes",
			length, r.Offset, r.Block, b.ID, b.Size)
	}
	return b, b.first + r.Offset>>b.shift, length >> b.shift, nil
}

// acceptZeros marks pages that are zero. Only those that a thread waits for are installed, the others stay holes.
func (s *session) acceptZeros(b *block, p, n uint64) error {
	for end := p + n; p < end; p++ {
		switch s.e.pages.arriveZero(p) {
		case arrivalUnasked:
			return unasked(b, p)
		case arrivalInstall:
			if err := s.e.zero(b, p); err != nil {
				return err
			}
			s.e.answered(p)
		case arrivalDrop:
			s.e.answered(p) // a thread that waited in an earlier session may have gone on
		}
	}
	return nil
}

// acceptLost tells the process of pages that nobody can read any more. A thread that touches one gets SIGBUS, which
// QEMU turns into a machine check of its guest.
func (s *session) acceptLost(record *uffd.CopyRecord, b *block, p, n uint64) error {
	if !b.poison {
		return protocolError("lost pages of block %d (%s), which were not asked for", b.index, b.ID)
	}
	for end := p + n; p < end; p++ {
		switch s.e.pages.arrive(p) {
		case arrivalUnasked:
			return unasked(b, p)
		case arrivalDrop:
			s.e.answered(p)
			continue
		}
		if err := s.poison(record, b, p); err != nil {
			return err
		}
		s.e.answered(p)
	}
	return nil
}

// poison poisons a page that the caller holds (installing).
func (s *session) poison(record *uffd.CopyRecord, b *block, p uint64) error {
	e := s.e
	for tries := 0; ; tries++ {
		if e.pages.stillWanted(p, 1) == 0 {
			return e.dropRevoked(b, p)
		}
		e.at("poison", p)
		_, err := b.UFFD.Poison(b.page(p), uffd.PoisonDontWake) // no thread may see it before lose decides
		if err == nil || errors.Is(err, uffd.ErrExist) {
			if err != nil { // it keeps what another process put there
				e.unexplained()
			}
			if e.pages.lose(p) {
				return b.UFFD.Wake(b.page(p))
			}
			return s.unpoison(record, b, p)
		}
		if errors.Is(err, uffd.ErrAgain) && s.again(tries) {
			continue
		}
		if errors.Is(err, uffd.ErrAgain) {
			return s.giveUp(p, 1, s.ctx.Err())
		}
		return s.giveUp(p, 1, explain(b, b.addr(p), err))
	}
}

// unpoison puts zeros in place of the poison of a page that the process has given up, perhaps before it was poisoned.
// The kernel lets a copy replace the poison (mfill_atomic_install_pte in mm/userfaultfd.c).
func (s *session) unpoison(record *uffd.CopyRecord, b *block, p uint64) error {
	for tries := 0; ; tries++ {
		_, err := b.UFFD.CopyRecorded(record, b.addr(p), zeros[:b.unit()], 0)
		switch {
		case err == nil, errors.Is(err, uffd.ErrExist): // or the process has put something there by now
			s.e.pages.finish(p, 1)
			return b.wake(p, 1)
		case errors.Is(err, uffd.ErrAgain) && s.again(tries):
			continue
		}
		return errors.Join(s.e.dropRevoked(b, p), s.ctx.Err()) // the memory is gone, or the session is over
	}
}

// acceptFilled installs pages that are zero where no hole may stay.
func (s *session) acceptFilled(record *uffd.CopyRecord, b *block, p, n uint64) error {
	most := max(1, uint64(copyBytes)>>b.shift)
	for n > 0 {
		k := min(n, most)
		if err := s.acceptData(record, b, p, k, zeros[:k<<b.shift]); err != nil {
			return err
		}
		p, n = p+k, n-k
	}
	return nil
}

// acceptData claims pages whose bytes came and installs them in runs that are as long as possible.
func (s *session) acceptData(record *uffd.CopyRecord, b *block, p, n uint64, data []byte) error {
	most := max(1, uint64(copyBytes)>>b.shift)
	for n > 0 {
		claimed, verdict := uint64(0), arrivalInstall
		for claimed < min(n, most) {
			if verdict = s.e.pages.arrive(p + claimed); verdict != arrivalInstall {
				break
			}
			claimed++
		}
		if err := s.install(record, b, p, claimed, data[:claimed<<b.shift]); err != nil {
			return err
		}
		switch verdict {
		case arrivalUnasked:
			return unasked(b, p+claimed)
		case arrivalDrop:
			s.e.answered(p + claimed)
			claimed++
		}
		p, n, data = p+claimed, n-claimed, data[claimed<<b.shift:]
	}
	return nil
}

func unasked(b *block, p uint64) error {
	return protocolError("the page at %#x of block %d (%s), which nobody asked for", (p-b.first)<<b.shift, b.index, b.ID)
}

// install installs n pages that the caller holds (installing). Those that it cannot install are missing again.
func (s *session) install(record *uffd.CopyRecord, b *block, p, n uint64, data []byte) error {
	e := s.e
	single := false // the kernel wants one page at a time
	for tries := 0; n > 0; {
		e.at("install", p)
		k := e.pages.stillWanted(p, n)
		if k == 0 {
			if err := e.dropRevoked(b, p); err != nil {
				return s.giveUp(p+1, n-1, err)
			}
			p, n, data = p+1, n-1, data[b.unit():]
			continue
		}
		if single {
			k = 1
		}
		e.at("copy", p)
		done, err := b.UFFD.CopyRecorded(record, b.addr(p), data[:k<<b.shift], 0)
		k = uint64(done) >> b.shift
		if errors.Is(err, uffd.ErrExist) { // somebody else put it there
			if err = e.occupied(record, b, b.addr(p), data[:b.unit()]); err == nil {
				k = 1
			}
		}
		e.at("copied", p)
		if e.pages.finish(p, k) {
			if err := b.wake(p, k); err != nil {
				return s.giveUp(p+k, n-k, err)
			}
		}
		for q := range k {
			e.answered(p + q)
		}
		p, n, data = p+k, n-k, data[k<<b.shift:]
		switch {
		case err == nil || k > 0:
			tries = 0
		case errors.Is(err, uffd.ErrNotRegistered) && !single && n > 1:
			single = true // perhaps it works page by page: memory policies and madvise cut mappings
		case errors.Is(err, uffd.ErrAgain) && s.again(tries),
			errors.Is(err, uffd.ErrNotRegistered) && tries < goneTries && s.again(tries):
			tries++
		default:
			if errors.Is(err, uffd.ErrAgain) { // again has returned false: the session is over
				return s.giveUp(p, n, s.ctx.Err())
			}
			return s.giveUp(p, n, explain(b, b.addr(p), err))
		}
	}
	return nil
}

// giveUp ends the session with err, because n pages from page p on, which the caller holds, cannot be put in. The
// session ends first: a second answer for a page that is missing again would be taken for a fault of the source's, and
// end it with that error.
func (s *session) giveUp(p, n uint64, err error) error {
	s.end(err)
	s.e.pages.giveUp(p, n)
	return err
}

// wake lets the threads that wait for n pages from page p on look again.
func (b *block) wake(p, n uint64) error {
	if err := b.UFFD.Wake(uffd.Range{Start: b.addr(p), Len: n << b.shift}); err != nil {
		return explain(b, b.addr(p), err)
	}
	return nil
}

// dropRevoked marks a page zero whose content came, if the process gave the page up before the content was put in.
// Threads that have faulted on it since then wait for its installer, and are to look again.
func (e *Engine) dropRevoked(b *block, p uint64) error {
	e.pages.drop(p)
	e.pending.end(p)
	return b.wake(p, 1)
}

// again waits a little before a try is repeated. It says false when the session is over.
func (s *session) again(tries int) bool {
	if s.ctx.Err() != nil {
		return false
	}
	if tries < againYields {
		runtime.Gosched()
	} else {
		time.Sleep(min(againFirstSleep<<min(tries-againYields, 16), againLongestSleep))
	}
	return true
}

// zeros is what a huge page of zeros is copied from.
var zeros [pagewire.MaxData]byte

// zero installs a page of zeros for a thread that waits; the caller holds the page (zeroing).
func (e *Engine) zero(b *block, p uint64) error {
	existed, err := e.fillZero(b, p)
	if err == nil {
		if existed && !b.minor && e.counters.discarded.Load() == 0 { // else the page may have come before it was given up
			e.unexplained()
		}
		e.pages.finishZero(p)
		return nil
	}
	// It stays a hole. This must not wait for the address space to settle, because it may run in the worker that has to
	// read the event. The thread looks again in a while.
	e.pages.giveUpZero(p)
	if errors.Is(err, uffd.ErrAgain) {
		e.later.wake(b.UFFD, b.page(p))
		return nil
	}
	if wakeErr := b.UFFD.Wake(b.page(p)); wakeErr != nil {
		return explain(b, b.addr(p), wakeErr)
	}
	if e.pages.left.Load() == 0 && errors.Is(err, uffd.ErrNotRegistered) {
		return nil // all memory is in and unregistered
	}
	return explain(b, b.addr(p), err)
}

// refill answers a fault on a page that was there. Mostly its message was just read late. But if the page was discarded
// without an event (fallocate(2) on the file), it reads as zero.
func (e *Engine) refill(b *block, p uint64) error {
	switch _, err := e.fillZero(b, p); {
	case err == nil:
		return b.UFFD.Wake(b.page(p))
	case errors.Is(err, uffd.ErrAgain):
		e.later.wake(b.UFFD, b.page(p))
		return nil
	default:
		return explain(b, b.addr(p), err)
	}
}

// fillZero makes one page of zeros. If there is a page already (existed), that is as good.
func (e *Engine) fillZero(b *block, p uint64) (existed bool, err error) {
	if b.zeropage {
		_, err = b.UFFD.Zeropage(b.page(p), 0)
	} else {
		_, err = b.UFFD.Copy(b.addr(p), zeros[:b.unit()], 0)
	}
	if existed = errors.Is(err, uffd.ErrExist); existed {
		err = e.keep(b, b.page(p))
	}
	return existed, err
}

// explain turns the kernel's error about the page at addr into one of the engine.
func explain(b *block, addr uint64, err error) error {
	var kind error
	switch {
	case errors.Is(err, uffd.ErrProcessGone):
		kind = ErrProcessGone
	case errors.Is(err, uffd.ErrNoMemory), errors.Is(err, uffd.ErrNoSpace):
		kind = ErrNoMemory
	case errors.Is(err, uffd.ErrNotRegistered):
		kind = ErrRangeGone
	default:
		return fmt.Errorf("page at %#x of RAM block %s: %w", addr-b.Addr, b.ID, err)
	}
	return fmt.Errorf("page at %#x of RAM block %s: %w: %w", addr-b.Addr, b.ID, kind, err)
}
