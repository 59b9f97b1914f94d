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
	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/inject"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// An earlyPage is the place of a page of the VM's memory.
type earlyPage struct {
	block  int
	offset uint64
}

// An earlyMemory is what a destination QEMU finds in the VM's memory while it loads the early state: the pages that
// came with it, of the moment at which it was saved. It has a userfaultfd of its own, which is gone before the memory
// is dropped and the engine registers it: nothing of it can be taken for the VM's.
type earlyMemory struct {
	taken  *inject.Taken
	waiter *uffd.Waiter
	blocks []qemu.RAMBlock
	pages  map[earlyPage][]byte
	served chan struct{} // closed when serve has returned

	mu      sync.Mutex
	section int                 // that is being loaded
	reads   map[int][]earlyPage // what each section has touched
	missed  []earlyPage         // that were not there
	err     error               // why serve has ended
}

// newEarlyMemory registers all memory of the destination's QEMU. pages must be of the size of their block's.
func newEarlyMemory(
	ctx context.Context, vm *qemu.VM, blocks []qemu.RAMBlock, pages map[earlyPage][]byte,
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
				if err := m.answer(e.Pagefault.Addr); err != nil {
					return err
				}
			}
		}
	}
}

func (m *earlyMemory) answer(addr uint64) error {
	i := slices.IndexFunc(m.blocks, func(b qemu.RAMBlock) bool { return addr-b.Addr < b.Size })
	if i < 0 {
		return fmt.Errorf("a fault at %#x, where the VM has no memory", addr)
	}
	b := m.blocks[i]
	page := earlyPage{i, (addr - b.Addr) &^ (b.PageSize - 1)}
	content, known := m.pages[page]
	if !known {
		// Whatever QEMU makes of zeros is thrown away. It goes on so that all that it wants becomes known at once.
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
	if errors.Is(err, uffd.ErrExist) { // two threads wanted it
		_ = m.taken.UFFD.Wake(uffd.Range{Start: b.Addr + page.offset, Len: b.PageSize})
		return nil
	}
	return err
}

// close ends the serving; a thread that waits for a page then finds what is there. What loading has wanted is known
// from then on.
func (m *earlyMemory) close(ctx context.Context) error {
	err := m.waiter.Interrupt()
	<-m.served
	return errors.Join(err, m.err, m.waiter.Close(), m.closeDescriptors(ctx))
}

// closeDescriptors ends the registration: both descriptors are one file.
func (m *earlyMemory) closeDescriptors(ctx context.Context) error {
	return errors.Join(m.taken.CloseRemote(ctx), m.taken.UFFD.Close())
}

// next is called when a section is loaded. What that has touched is taken away again, so that it is known of the next
// what it reads, too.
func (m *earlyMemory) next(ctx context.Context, vm *qemu.VM) error {
	m.mu.Lock()
	pages := m.reads[m.section]
	m.section++
	m.mu.Unlock()
	if len(pages) == 0 {
		return nil
	}
	var ranges []qemu.RAMRange
	for _, p := range pages {
		b := m.blocks[p.block]
		ranges = append(ranges, qemu.RAMRange{Block: b, Offset: p.offset, Size: b.PageSize})
	}
	return vm.DropRanges(ctx, ranges)
}

// readers are the sections that touched memory, sorted.
func (m *earlyMemory) readers() []int { return slices.Sorted(maps.Keys(m.reads)) }

// shownReaders are they with what they touched, as the source is told.
func (m *earlyMemory) shownReaders() (shown []*migratedv1.Reader) {
	for _, i := range m.readers() {
		shown = append(shown, &migratedv1.Reader{Section: uint32(i), Pages: places(m.reads[i])})
	}
	return shown
}

// shownMissed is what was missed, as the source is told.
func (m *earlyMemory) shownMissed() []*migratedv1.Memory { return places(m.missed) }

func places(pages []earlyPage) (shown []*migratedv1.Memory) {
	for _, p := range pages {
		shown = append(shown, &migratedv1.Memory{Block: uint32(p.block), Offset: p.offset})
	}
	return shown
}

// touched are all pages that were, in order.
func (m *earlyMemory) touched() []earlyPage {
	all := slices.Concat(slices.Collect(maps.Values(m.reads))...)
	slices.SortFunc(all, func(a, b earlyPage) int {
		return cmp.Or(cmp.Compare(a.block, b.block), cmp.Compare(a.offset, b.offset))
	})
	return slices.Compact(all)
}
