// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/ram"
	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/inject"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// An earlyPage is the location of a page of the VM's memory.
type earlyPage struct {
	block  int
	offset uint64
}

// An earlyMemory is the memory that a destination QEMU sees while it loads the early state: the pages that came with
// that state, as they were when it was saved. It has a userfaultfd of its own. That is closed before the memory is
// dropped and the engine registers it, so these pages never become the VM's.
type earlyMemory struct {
	taken  *inject.Taken
	waiter *uffd.Waiter
	blocks []ram.Block
	pages  map[earlyPage][]byte
	served chan struct{} // closed when serve has returned

	mu      sync.Mutex
	section int                 // being loaded
	reads   map[int][]earlyPage // by section: pages that loading it touched
	missed  []earlyPage         // touched pages that did not come along
	err     error               // why serve has ended
}

// newEarlyMemory registers all memory of the destination's QEMU. Each of pages must have the page size of its block.
func newEarlyMemory(
	ctx context.Context, vm *qemu.VM, blocks []ram.Block, pages map[earlyPage][]byte,
) (*earlyMemory, error) {
	taken, err := inject.Take(ctx, vm.Pid, inject.TakeOptions{HandDevice: vm.HandFD})
	if err != nil {
		return nil, fmt.Errorf("take a userfaultfd for the early load: %w", err)
	}
	m := &earlyMemory{
		taken: taken, blocks: blocks, pages: pages, served: make(chan struct{}), reads: map[int][]earlyPage{},
	}
	if err := m.register(); err != nil {
		return nil, errors.Join(fmt.Errorf("register the memory for the early load: %w", err), m.closeDescriptors(ctx))
	}
	go func() {
		defer close(m.served)
		if err := m.serve(); !errors.Is(err, uffd.ErrInterrupted) {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.err = err
		}
	}()
	return m, nil
}

func (m *earlyMemory) register() (err error) {
	if _, _, err := m.taken.UFFD.API(0); err != nil {
		return err
	}
	for _, b := range m.blocks {
		if _, err := m.taken.UFFD.Register(uffd.Range{Start: b.Addr, Len: b.Size}, uffd.ModeMissing); err != nil {
			return fmt.Errorf("RAM %q: %w", b.ID, err)
		}
	}
	m.waiter, err = uffd.NewWaiter(m.taken.UFFD)
	return err
}

// serve answers faults until it is interrupted.
func (m *earlyMemory) serve() error {
	buf := uffd.NewEventBuffer(16)
	for {
		if err := m.waiter.Wait(); err != nil {
			return err
		}
		switch _, err := m.taken.UFFD.Read(buf); {
		case errors.Is(err, uffd.ErrWouldBlock):
			continue
		case err != nil:
			return err
		}
		for i := range buf.Len() {
			if e := buf.At(i); e.Kind == uffd.EventPagefault {
				if err := m.resolve(e.Pagefault.Addr); err != nil {
					return err
				}
			}
		}
	}
}

func (m *earlyMemory) resolve(addr uint64) error {
	i := slices.IndexFunc(m.blocks, func(b ram.Block) bool { return addr-b.Addr < b.Size })
	if i < 0 {
		return fmt.Errorf("a fault at %#x, where the VM has no memory", addr)
	}
	b := m.blocks[i]
	page := earlyPage{i, (addr - b.Addr) &^ (b.PageSize - 1)}
	content, known := m.pages[page]
	if !known {
		// QEMU reads zeros instead and goes on, so that all missing pages become known at once. What it loads then is
		// thrown away.
		content = make([]byte, b.PageSize)
	}
	m.mu.Lock()
	if !slices.Contains(m.reads[m.section], page) {
		m.reads[m.section] = append(m.reads[m.section], page)
	}
	if !known && !slices.Contains(m.missed, page) {
		m.missed = append(m.missed, page)
	}
	m.mu.Unlock()
	_, err := m.taken.UFFD.Copy(b.Addr+page.offset, content, 0)
	if errors.Is(err, uffd.ErrExist) { // another thread's fault was answered first
		_ = m.taken.UFFD.Wake(uffd.Range{Start: b.Addr + page.offset, Len: b.PageSize})
		return nil
	}
	return err
}

// close stops answering faults and removes the registration: a waiting thread then reads what is there. After close,
// reads and missed are complete.
func (m *earlyMemory) close(ctx context.Context) error {
	err := m.waiter.Interrupt()
	<-m.served
	return errors.Join(err, m.err, m.waiter.Close(), m.closeDescriptors(ctx))
}

// closeDescriptors closes both descriptors of the userfaultfd, which ends the registration.
func (m *earlyMemory) closeDescriptors(ctx context.Context) error {
	return errors.Join(m.taken.CloseRemote(ctx), m.taken.UFFD.Close())
}

// sectionLoaded is called after each section. It drops the pages that this section touched, so that the next section
// faults on them again and its reads become known, too.
func (m *earlyMemory) sectionLoaded(ctx context.Context, vm *qemu.VM) error {
	m.mu.Lock()
	pages := m.reads[m.section]
	m.section++
	m.mu.Unlock()
	if len(pages) == 0 {
		return nil
	}
	var ranges []ram.Range
	for _, p := range pages {
		b := m.blocks[p.block]
		ranges = append(ranges, ram.Range{Block: b, Offset: p.offset, Size: b.PageSize})
	}
	return vm.RAM.DropRanges(ctx, ranges)
}

// readers returns the sections that touched memory, sorted.
func (m *earlyMemory) readers() []int { return slices.Sorted(maps.Keys(m.reads)) }

// shownReaders returns the readers and the pages that they touched, for the source.
func (m *earlyMemory) shownReaders() (shown []*migratedv1.Reader) {
	for _, i := range m.readers() {
		shown = append(shown, &migratedv1.Reader{Section: uint32(i), Pages: shownPages(m.reads[i])})
	}
	return shown
}

// shownMissed returns the missed pages, for the source.
func (m *earlyMemory) shownMissed() []*migratedv1.Memory { return shownPages(m.missed) }

func shownPages(pages []earlyPage) (shown []*migratedv1.Memory) {
	for _, p := range pages {
		shown = append(shown, &migratedv1.Memory{Block: uint32(p.block), Offset: p.offset})
	}
	return shown
}

// touched returns all touched pages, sorted, each once.
func (m *earlyMemory) touched() []earlyPage {
	all := slices.Concat(slices.Collect(maps.Values(m.reads))...)
	slices.SortFunc(all, func(a, b earlyPage) int {
		return cmp.Or(cmp.Compare(a.block, b.block), cmp.Compare(a.offset, b.offset))
	})
	return slices.Compact(all)
}
