// SPDX-License-Identifier: Apache-2.0

package postcopy

import "sync"

// gate keeps copies and reads of messages apart, where discards must be exact. Without it this can happen:
//
//	installer                     event reader              process
//	checks: page is installing
//	                                                        madvise(MADV_REMOVE): waits for the event to be read
//	                              read(2): REMOVE     ────► goes on, drops the page
//	UFFDIO_COPY of old content
//	                              marks the page zero: too late
//
// With it, a copy is either over before the event is read, and the process drops it, or its installer sees the mark.
// Installers hold the gate for one ioctl only, never while they wait for an event to be read (EAGAIN).
type gate struct {
	on bool
	mu sync.RWMutex
}

// enter and leave enclose an installer's check and its ioctl.
func (g *gate) enter() {
	if g.on {
		g.mu.RLock()
	}
}

func (g *gate) leave() {
	if g.on {
		g.mu.RUnlock()
	}
}

// shut and open enclose a reader's read(2) and its marks.
func (g *gate) shut() {
	if g.on {
		g.mu.Lock()
	}
}

func (g *gate) open() {
	if g.on {
		g.mu.Unlock()
	}
}
