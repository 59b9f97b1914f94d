// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/uffd"
)

// complete unregisters everything, as all pages are in. The kernel wakes the threads that still wait. They wait for
// holes, which read as zero now. If ctx ends first, Run may be called again.
func (e *Engine) complete(ctx context.Context) error {
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
		page := e.blocks[e.first(u)].page(e.blocks[e.first(u)].first)
		if err := settle(ctx, u, func() bool {
			_, err := u.Copy(page.Start, zeros[:page.Len], 0)
			return errors.Is(err, uffd.ErrAgain)
		}); err != nil {
			return err
		}
	}
	close(e.done)
	return nil
}

// settle reads the last events. No new event can begin. But a thread that has queued one, or is about to, sleeps until
// it is read, perhaps with QEMU's big lock. While there is such a thread, the address space is changing: the kernel
// answers EAGAIN. Nobody reads after settle, so it goes on for as long as that takes, or the process lives.
func settle(ctx context.Context, u *uffd.UFFD, isChanging func() bool) error {
	buf := uffd.NewEventBuffer(eventBatch)
	for pause := againFirstSleep; ; pause = min(2*pause, againLongestSleep) {
		n, err := u.Read(buf)
		for i := range n {
			if ev := buf.At(i); ev.Kind == uffd.EventFork { // the child finds all memory in
				_ = unix.Close(ev.Fork.FD)
			}
		}
		if err == nil {
			continue
		}
		if !isChanging() {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		time.Sleep(pause)
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
