// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/uffd"
)

// complete unregisters everything, as all pages are in. The kernel wakes the threads that still wait. They wait for
// holes, which read as zero now.
func (e *Engine) complete() error {
	e.counters.lastPage.CompareAndSwap(0, e.now())
	for i := range e.blocks {
		b := &e.blocks[i]
		err := b.UFFD.Unregister(b.all())
		// ErrInvalid: the process unmapped all of it. ErrNoMemory: the process is gone.
		if err != nil && !errors.Is(err, uffd.ErrInvalid) {
			if errors.Is(err, uffd.ErrNoMemory) {
				return fmt.Errorf("RAM block %s: %w: %w", b.ID, ErrProcessGone, err)
			}
			return fmt.Errorf("RAM block %s: %w", b.ID, err)
		}
	}
	for _, u := range e.uffds {
		e.settle(u)
	}
	close(e.done)
	return nil
}

// settle reads the last events. No new event can begin. But a thread that has queued one, or is about to, sleeps until
// it is read, perhaps with QEMU's big lock. While there is an event, the kernel answers EAGAIN.
func (e *Engine) settle(u *uffd.UFFD) {
	buf := uffd.NewEventBuffer(eventBatch)
	page := e.blocks[e.first(u)].page(e.blocks[e.first(u)].first)
	for tries := 0; tries < goneTries; tries++ {
		n, err := u.Read(buf)
		for i := range n {
			if ev := buf.At(i); ev.Kind == uffd.EventFork { // the child finds all memory in
				_ = unix.Close(ev.Fork.FD)
			}
		}
		if err == nil {
			continue
		}
		if _, err := u.Copy(page.Start, zeros[:page.Len], 0); !errors.Is(err, uffd.ErrAgain) {
			return
		}
		time.Sleep(againFirstSleep)
	}
}

// first returns the index of the first block of a descriptor.
func (e *Engine) first(u *uffd.UFFD) int {
	for i := range e.blocks {
		if e.blocks[i].UFFD == u {
			return i
		}
	}
	panic("postcopy: a descriptor without a block")
}
