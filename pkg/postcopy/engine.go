// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"errors"
	"fmt"
	"math/bits"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/migrated-vm/migrated/pkg/uffd"
)

// A Block is a piece of guest RAM of the destination. Its index in Options.Blocks is the block number on the wire.
type Block struct {
	ID       string // QEMU's name of it, for messages
	Addr     uint64 // of its first byte in the destination process
	Size     uint64 // bytes, a multiple of PageSize
	PageSize uint64 // bytes, a power of two from 4 KiB to 1 GiB
	// UFFD belongs to the destination process and is non-blocking. It may serve several blocks. The caller closes it
	// after the last Run has returned. If the caller has made its handshake, it was with the events for memory that the
	// process gives up, unmaps or moves (FeatureEventRemove, FeatureEventUnmap, FeatureEventRemap) and with
	// FeatureThreadID: without the events, memory that the process has given up would get its old content.
	UFFD *uffd.UFFD
	// Populated says that all of the block is to be there in the end, pages of zeros as well, because the VM was
	// promised its memory. In other blocks pages of zeros are left as holes.
	Populated bool
	// File is the file that Addr maps, shared and from FileOffset on, open for reading and writing. With it, a page
	// that another process touches before it has come does no harm to the VM, see others.go. The caller closes it, as
	// UFFD. nil: the memory is private, or the file is not known.
	File       *os.File
	FileOffset int64
	// Private says that nobody but the process has the memory. A poisoned page is then lost to all: no other process
	// reads it in another way and takes it for zeros.
	Private bool
	// First says that the sweep is to bring this block before all blocks that are not First, because the source may
	// lose it soonest.
	First bool
}

// Options of an Engine.
type Options struct {
	Blocks []Block
	// Workers is how many fault workers, and so how many demand lanes, there are. 0: 2.
	Workers int
	// State is where the states of all pages are kept: StateSize bytes, aligned to 8, that the caller leaves alone
	// until Run has succeeded. Zeros: everything is missing. If the memory outlives the process (a mapped file on
	// tmpfs), another Engine, of a later process, goes on where this one ended, no matter how it ended. nil: memory of
	// the engine's own.
	State []byte
	// Copies is where the kernel writes the result of each UFFDIO_COPY: CopiesSize bytes at least, aligned to 8. It goes
	// with State, and says whether pages that were being installed when a process ended are there. nil: memory of the
	// engine's own.
	Copies []byte
	// Pagemap is the pagemap of the process. It must stay open as long as UFFD. Without it no Block's File is of use.
	Pagemap *uffd.Pagemap
	// LoadAhead is how much a fault asks for, in bytes, before StartSweep. The memory that loading the device state
	// touches lies together (option ROMs, on a PC), and the VM stands still for each of these faults. 0: a fault asks
	// for its page alone.
	LoadAhead uint64
	// Sleeps is called when more threads, or fewer (negative), sleep in system calls of this engine. With too few
	// processors (runtime.GOMAXPROCS), Go's runtime takes the processor away from a goroutine in a system call, and waking
	// it takes longer then. The program decides whether to add processors. nil: it is not called.
	Sleeps func(threads int)
	// Bandwidth is the limit that SetBandwidth changes, in bytes a second. 0: none.
	Bandwidth uint64
}

// CopiesSize is the size of Options.Copies, in bytes, for that many workers and all bulk lanes. A larger size may be
// given, and must be where an earlier engine had more workers. With a smaller one there are fewer bulk lanes; the least
// is workers+2 records.
func CopiesSize(workers int) int { return (workers + 1 + mostBulkLanes) * uffd.CopyRecordSize }

// StateSize is how many bytes Options.State has for these blocks: half a byte a page. Blocks that New refuses have
// none.
func StateSize(blocks []Block) int {
	words := uint64(0)
	for _, b := range blocks {
		if b.PageSize > 0 {
			words += wordsFor(b.Size / unit(b.PageSize))
		}
	}
	return int(words * wordSize)
}

// block is a Block with what is derived from it.
type block struct {
	Block
	index    int
	first    uint64 // global number of its first page
	pages    uint64
	shift    int  // log2 of a page's size: of PageSize, or of a part of it
	zeropage bool // UFFDIO_ZEROPAGE works; hugetlbfs has none
	poison   bool // UFFDIO_POISON works, and is enough
	minor    bool // registered for minor faults, see others.go

	heat     heat       // what threads waited for
	gigantic []gigantic // one for each of the kernel's pages, where those cross the network in parts; else nil
}

func (b *block) addr(p uint64) uint64 { return b.Addr + (p-b.first)<<b.shift }
func (b *block) end() uint64          { return b.first + b.pages }
func (b *block) all() uffd.Range      { return uffd.Range{Start: b.Addr, Len: b.Size} }
func (b *block) page(p uint64) uffd.Range {
	return uffd.Range{Start: b.addr(p), Len: b.unit()}
}
func (b *block) unit() uint64 { return 1 << b.shift }

// unit is the size of the memory that one state describes, for pages of that size: a page, or the part of a gigantic
// page that crosses the network at a time.
func unit(pageSize uint64) uint64 { return min(pageSize, partSize) }

// Engine fills the memory of one destination process. Its methods may be called from any goroutine.
type Engine struct {
	blocks  []block
	uffds   []*uffd.UFFD // each once
	workers int

	pages     *pages
	pagemap   *uffd.Pagemap     // Options.Pagemap
	copies    []uffd.CopyRecord // of each worker's lane, one for wholeMu, then of each bulk lane
	wholeMu   sync.Mutex        // held by a worker that installs a gigantic page; owns wholeCopy
	pending   pending
	fastest   fastest // answer to a fault that was the first to ask
	latency   histogram
	counters  counters
	predictor predictor
	budget    *budget
	later     later
	epoch     time.Time // pending's times count from here
	hints     hints
	unread    []uint64 // pages that the source could not read, kept from one Run to the next; session.bulk.mu

	started  atomic.Bool
	sweeping chan struct{} // closed by StartSweep
	foreseen chan []Range  // from Foresee
	running  atomic.Bool
	done     chan struct{} // closed when Run has succeeded

	ahead  uint64    // Options.LoadAhead
	sleeps func(int) // Options.Sleeps, or a function that does nothing

	// park is nil except in tests, which stop a goroutine at the point that is named.
	park func(point string, page uint64)
	// bulkLanes is 0 except in tests, which say how many lanes the sweep has, from its beginning and at most 8.
	bulkLanes int
}

// New makes the handshake on each descriptor, unless it was made before, and registers the blocks for
// missing pages: from then on every touch of one that is not there waits for Run. Call it before anything
// touches the memory, so before migrate-incoming.
//
// When it fails, the blocks before the one it names stay registered.
func New(o Options) (*Engine, error) {
	if len(o.Blocks) == 0 {
		return nil, errors.New("post-copy: the VM has no RAM block")
	}
	e := &Engine{
		workers: o.Workers, epoch: time.Now(), budget: newBudget(o.Bandwidth),
		sweeping: make(chan struct{}), foreseen: make(chan []Range, 1), done: make(chan struct{}),
		ahead: o.LoadAhead, pagemap: o.Pagemap,
	}
	if e.workers <= 0 {
		e.workers = defaultWorkers
	}
	if e.sleeps = o.Sleeps; e.sleeps == nil {
		e.sleeps = func(int) {}
	}
	counts, total := make([]uint64, len(o.Blocks)), uint64(0)
	for i, b := range o.Blocks {
		if err := check(b); err != nil {
			return nil, fmt.Errorf("post-copy: RAM block %d (%s): %w", i, b.ID, err)
		}
		counts[i] = b.Size / unit(b.PageSize)
		total += counts[i]
	}
	var first []uint64
	var err error
	if e.pages, first, err = newPages(counts, o.State); err != nil {
		return nil, fmt.Errorf("post-copy: %w", err)
	}
	takenUp := uint64(e.pages.left.Load()) < total
	for i, b := range o.Blocks {
		nb := block{Block: b, index: i, first: first[i], pages: counts[i], shift: bits.TrailingZeros64(unit(b.PageSize))}
		if b.PageSize > partSize {
			nb.gigantic = make([]gigantic, b.Size/b.PageSize)
		}
		err := e.register(&nb)
		if takenUp && errors.Is(err, uffd.ErrInvalid) && e.pages.areUnmapped(&nb) {
			e.pages.discard(nb.first, nb.pages)
			err = nil
		}
		if err != nil {
			return nil, fmt.Errorf("post-copy: RAM block %d (%s): %w", i, b.ID, err)
		}
		e.blocks = append(e.blocks, nb)
	}
	for i, h := range heatOf(e.blocks) {
		e.blocks[i].heat = h
	}
	return e, e.takeUpCopies(o.Copies)
}

func check(b Block) error {
	switch {
	case b.PageSize < 4096 || bits.OnesCount64(b.PageSize) != 1 || b.PageSize > largestPage:
		return fmt.Errorf("page size of %d bytes is no power of two from 4096 to %d", b.PageSize, largestPage)
	case b.Size == 0 || b.Size%b.PageSize != 0 || b.Addr%b.PageSize != 0:
		return fmt.Errorf("%d bytes at %#x are not whole pages of %d bytes", b.Size, b.Addr, b.PageSize)
	case b.UFFD == nil:
		return errors.New("no userfaultfd")
	}
	return nil
}

// The events that must not be missed: without them the process would go on at once, and pages in flight would land in
// memory that means something else by now. fault.go has what is done about each of them. predict.go needs the id of the
// thread that faults.
const features = uffd.FeatureEventRemove | uffd.FeatureEventUnmap | uffd.FeatureEventRemap | uffd.FeatureThreadID

// register makes sure that faults in b become messages.
func (e *Engine) register(b *block) error {
	if e.index(b.UFFD) < 0 {
		_, _, err := b.UFFD.API(features | uffd.FeatureEventFork)
		// There is no CAP_SYS_PTRACE, or the descriptor is UFFD_SECURE. QEMU's RAM is not inherited anyway:
		// MADV_DONTFORK.
		if errors.Is(err, uffd.ErrPermission) || errors.Is(err, uffd.ErrForkRefused) {
			_, _, err = b.UFFD.API(features)
		}
		// ErrInvalid: the handshake was made before, by us in an earlier life. Register finds out if not.
		if err != nil && !errors.Is(err, uffd.ErrInvalid) {
			return err
		}
		e.uffds = append(e.uffds, b.UFFD)
	}
	mode := uffd.ModeMissing
	if b.minor = b.File != nil && e.pagemap != nil; b.minor {
		mode |= uffd.ModeMinor
	}
	ioctls, err := b.UFFD.Register(b.all(), mode)
	if b.minor && errors.Is(err, uffd.ErrInvalid) { // Linux before 5.14 (hugetlbfs: 5.13)
		b.minor = false
		ioctls, err = b.UFFD.Register(b.all(), uffd.ModeMissing)
	}
	if err != nil {
		return err
	}
	b.zeropage = uffd.CanZeropage(ioctls)
	b.poison = b.Private && b.gigantic == nil && uffd.CanPoison(ioctls)
	return nil
}

func (e *Engine) index(u *uffd.UFFD) int {
	for i := range e.uffds {
		if e.uffds[i] == u {
			return i
		}
	}
	return -1
}

// CanLose says whether the process can be told of pages that the source has lost: all of its memory is private, and the
// kernel has UFFDIO_POISON (Linux 6.6). The lanes that are given to Run may ask for them then (pagewire.LostKey).
func (e *Engine) CanLose() bool {
	return !slices.ContainsFunc(e.blocks, func(b block) bool { return !b.poison })
}

// Lost returns the pages that the source has lost, in at most most ranges.
func (e *Engine) Lost(most int) (all []Range) {
	if e.pages.lost.Load() == 0 {
		return nil
	}
	for p := range e.pages.each(lost) {
		b := e.holder(p)
		at := (p - b.first) << b.shift
		if n := len(all); n > 0 && all[n-1].Block == b.index && all[n-1].Offset+all[n-1].Bytes == at {
			all[n-1].Bytes += b.unit()
			continue
		}
		if len(all) == most {
			break
		}
		all = append(all, Range{Block: b.index, Offset: at, Bytes: b.unit()})
	}
	return all
}

// StartSweep lets the background sweep begin, in this Run or the next. Call it when the VM runs here: before that
// the sweep would only compete with the device state for the network.
func (e *Engine) StartSweep() {
	if e.started.CompareAndSwap(false, true) {
		close(e.sweeping)
	}
}

// A Range is memory of the block with that index: so many bytes from Offset on.
type Range struct {
	Block         int
	Offset, Bytes uint64
}

// Foresee makes Run ask for these ranges before a thread waits there, because loading the device state will touch them.
// Call it once, before QEMU loads, with the ranges in the order in which loading will touch them. The source answers as
// soon as it has stopped the VM. Memory beyond a block, or beyond foreseenMost ranges, is left to faults.
func (e *Engine) Foresee(all []Range) {
	select {
	case e.foreseen <- all[:min(len(all), foreseenMost)]:
	default: // the first call's are not asked for yet: faults bring these
	}
}

// SetBandwidth limits, from now on, the packed bytes a second of pages that no thread waits for: those of the sweep,
// and those that faults foretell. Pages that a thread waits for are neither held up nor counted, and nothing is held up
// before StartSweep. 0: no limit.
func (e *Engine) SetBandwidth(bytesPerSecond uint64) { e.budget.set(bytesPerSecond) }

// Done is closed when all memory is in and nothing is registered any more.
func (e *Engine) Done() <-chan struct{} { return e.done }

// find returns the block that holds addr, as far as u is concerned, or nil. There are few blocks.
func (e *Engine) find(u *uffd.UFFD, addr uint64) *block {
	for i := range e.blocks {
		if b := &e.blocks[i]; addr-b.Addr < b.Size && b.UFFD == u {
			return b
		}
	}
	return nil
}

// holder returns the block of a page.
func (e *Engine) holder(p uint64) *block {
	i := len(e.blocks) - 1
	for e.blocks[i].first > p {
		i--
	}
	return &e.blocks[i]
}

// now is the time since the epoch in ns, by the monotonic clock.
func (e *Engine) now() int64 { return int64(time.Since(e.epoch)) }

// Close frees the memory in which gigantic pages were put together. Call it after the last Run. The engine's figures
// (Stats, Lost, Map, …) stay.
func (e *Engine) Close() error {
	var errs []error
	for i := range e.blocks {
		for j := range e.blocks[i].gigantic {
			g := &e.blocks[i].gigantic[j]
			g.mu.Lock()
			errs = append(errs, g.free())
			g.mu.Unlock()
		}
	}
	return errors.Join(errs...)
}

// answered ends the time of the fault on page p, if there was one.
func (e *Engine) answered(p uint64) {
	if when, trip, ok := e.pending.end(p); ok {
		d := time.Duration(e.now() - when)
		e.latency.add(d)
		if trip { // a page that was on its way already may come at any time
			e.fastest.add(d)
		}
	}
}

func (e *Engine) at(point string, page uint64) {
	if e.park != nil {
		e.park(point, page)
	}
}
