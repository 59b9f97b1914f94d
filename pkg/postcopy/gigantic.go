// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/pagewire"
	"github.com/migrated-vm/migrated/pkg/uffd"
)

// The kernel installs a page of hugetlbfs whole, and one of 1 GiB is too large for a message. It crosses the network in
// parts, each with a state of its own in the page table, and is put together in memory of ours:
//
//	missing ─► swept, demanded, ahead ─► installing (the part is in memory of ours) ──┐
//	                                                                                  ├─► all: UFFDIO_COPY ─► present
//	missing ─► ... ─► zero, revoked (the process has given it up) ────────────────────┘
//
// A thread that faults on such a page waits for all of its parts, which are asked for at once. A page of which all
// parts are zero stays a hole until a thread waits for it. When a daemon ends, the next one fetches again what was put
// together: it takes a part that is installing for one that is missing.
//
// The lock of such a page is taken twice for each part of 2 MiB, and by a fault on it, which takes the engine's wholeMu
// as well. Other pages take no lock.
type gigantic struct {
	mu     sync.Mutex
	memory []byte // of the page's size; nil: no part with anything in it has come
	waited bool   // a thread waits for the page, or has
}

// partSize is the size of a part, in bytes: what a message carries. Tests make it smaller.
var partSize uint64 = pagewire.MaxData

// largestPage is the size of the largest pages that x86-64 has, in bytes.
const largestPage = 1 << 30

// parts is how many parts a gigantic page has.
func (b *block) parts() uint64 { return b.PageSize >> b.shift }

// whole returns the gigantic page to which part p belongs, and the number of its first part.
func (b *block) whole(p uint64) (*gigantic, uint64) {
	i := (p - b.first) / b.parts()
	return &b.gigantic[i], b.first + i*b.parts()
}

func (b *block) wholeRange(first uint64) uffd.Range {
	return uffd.Range{Start: b.addr(first), Len: b.PageSize}
}

// faultGigantic is step 2 of a fault on a gigantic page: it asks for all parts that are missing.
func (w *worker) faultGigantic(b *block, p uint64, now int64) error {
	e := w.s.e
	g, first := b.whole(p)
	g.mu.Lock()
	g.waited = true
	g.mu.Unlock()
	e.counters.faults[claimRequest].Add(1)
	b.heat.add(p - b.first)
	e.pending.start(p, now, true)
	for q := first; q < first+b.parts(); q++ {
		switch e.pages.claimFault(q) {
		case claimRequest, claimAgain:
			if err := w.ask(b, q); err != nil {
				return err
			}
		case claimZero:
			e.pages.giveUpZero(q)
		}
	}
	// The last part may have come before this. The lane's record is its receiver's.
	e.wholeMu.Lock()
	err := e.assemble(e.wholeCopy(), b, first)
	e.wholeMu.Unlock()
	if !e.pages.isWaitedFor(p) { // as in fault
		e.pending.end(p)
	}
	if errors.Is(err, uffd.ErrAgain) {
		// Nobody may wait here for the address space to settle, see zero.
		e.later.wake(b.UFFD, b.wholeRange(first))
		return nil
	}
	return err
}

// acceptParts is step 5 for parts of gigantic pages; data is empty if they are zero.
func (s *session) acceptParts(record *uffd.CopyRecord, b *block, p, n uint64, data []byte) error {
	for end := p + n; p < end; p++ {
		var part []byte
		if len(data) > 0 {
			part, data = data[:b.unit()], data[b.unit():]
		}
		claimed, err := s.e.arrivePart(b, p, part)
		if err != nil {
			return err
		}
		if !claimed {
			continue
		}
		_, first := b.whole(p)
		err = s.e.assemble(record, b, first)
		for tries := 0; errors.Is(err, uffd.ErrAgain) && s.again(tries); tries++ {
			err = s.e.assemble(record, b, first)
		}
		if errors.Is(err, uffd.ErrAgain) { // the session is over; the next fault, or part, installs it
			return s.ctx.Err()
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// resume goes on with gigantic pages of which an earlier session has brought all parts but could not install them. If a
// page cannot be installed now either, it is fetched once more.
func (e *Engine) resume() error {
	for i := range e.blocks {
		b := &e.blocks[i]
		for j := range b.gigantic {
			first := b.first + uint64(j)*b.parts()
			err := e.assemble(&e.copies[0], b, first)
			if errors.Is(err, uffd.ErrAgain) {
				e.pages.giveUp(first, b.parts())
				err = nil
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// arrivePart claims a part that came, and puts it where its page is put together; a nil part is zeros. Both are one
// step, because another lane that has brought the rest of the page takes a part that is installing for one that is
// there.
func (e *Engine) arrivePart(b *block, p uint64, part []byte) (claimed bool, err error) {
	g, first := b.whole(p)
	g.mu.Lock()
	defer g.mu.Unlock()
	switch e.pages.arrive(p) {
	case arrivalUnasked:
		return false, unasked(b, p)
	case arrivalDrop:
		return false, nil
	}
	if err := b.put(g, first, p, part); err != nil {
		e.pages.giveUp(p, 1)
		return false, err
	}
	return true, nil
}

// put does the second half of arrivePart.
func (b *block) put(g *gigantic, first, p uint64, part []byte) (err error) {
	if g.memory == nil && part == nil {
		return nil
	}
	if g.memory == nil {
		const flags = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_NORESERVE
		if g.memory, err = unix.Mmap(-1, 0, int(b.PageSize), unix.PROT_READ|unix.PROT_WRITE, flags); err != nil {
			return fmt.Errorf("memory to put a page of %d bytes together: %w: %w", b.PageSize, ErrNoMemory, err)
		}
	}
	to := g.memory[(p-first)<<b.shift:][:b.unit()]
	if part == nil {
		clear(to)
	} else {
		copy(to, part)
	}
	return nil
}

// assemble installs a gigantic page if nothing of it is missing any more. uffd.ErrAgain: the address space is changing.
func (e *Engine) assemble(record *uffd.CopyRecord, b *block, first uint64) error {
	g, _ := b.whole(first)
	g.mu.Lock()
	defer g.mu.Unlock()
	there := false
	for q := first; q < first+b.parts(); q++ {
		switch e.pages.get(q) {
		case installing, zeroing:
		case present:
			there = true
		case zero, revoked:
			if g.memory != nil {
				clear(g.memory[(q-first)<<b.shift:][:b.unit()])
			}
		default:
			return nil // it is on its way
		}
	}
	if !there && g.memory == nil && !g.waited && !b.Populated {
		e.pages.holes(first, b.parts())
		return nil
	}
	if there && !g.waited {
		return nil
	}
	if err := e.installWhole(record, b, g, first, there); err != nil {
		return err
	}
	again := e.pages.finish(first, b.parts())
	e.pages.fillHoles(first, b.parts())
	for q := range b.parts() {
		e.answered(first + q)
	}
	g.waited = false
	var err error
	if again {
		err = b.wake(first, b.parts())
	}
	return errors.Join(err, g.free())
}

// free frees the memory in which the page was put together. The caller holds mu.
func (g *gigantic) free() (err error) {
	if g.memory != nil {
		err = unix.Munmap(g.memory)
		g.memory = nil
	}
	return err
}

// installWhole puts a page in, or zeros where nothing else has come. there: it has been there before.
func (e *Engine) installWhole(record *uffd.CopyRecord, b *block, g *gigantic, first uint64, there bool) (err error) {
	memory := g.memory
	if memory == nil { // reading the zeros makes no page
		const flags = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_NORESERVE
		if memory, err = unix.Mmap(-1, 0, int(b.PageSize), unix.PROT_READ, flags); err != nil {
			return fmt.Errorf("a page of %d zeros: %w: %w", b.PageSize, ErrNoMemory, err)
		}
		defer func() { err = errors.Join(err, unix.Munmap(memory)) }()
	}
	_, err = b.UFFD.CopyRecorded(record, b.addr(first), memory, 0)
	switch {
	case errors.Is(err, uffd.ErrExist) && there:
		return e.keep(b, b.wholeRange(first))
	case errors.Is(err, uffd.ErrExist):
		return e.occupied(record, b, b.addr(first), memory)
	case err == nil || errors.Is(err, uffd.ErrAgain):
		return err
	case e.pages.left.Load() == 0 && errors.Is(err, uffd.ErrNotRegistered):
		return nil // all memory is in and unregistered
	}
	return explain(b, b.addr(first), err)
}
