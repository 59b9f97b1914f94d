// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"runtime/debug"
	"sync"
)

// A collector keeps the garbage collector from running while a VM stands
// still: a collection at the wrong moment costs the switch more than all of its
// own work, because whoever allocates meanwhile is made to help. What piles up
// during a switch is a megabyte or two, and a switch is bounded in time.
type collector struct {
	mu      sync.Mutex
	holders int
	percent int // to be restored by the last holder
}

// garbage is the process' only one, like what it holds.
var garbage collector

// hold keeps collections away until the function that it returns is called.
func (c *collector) hold() (release func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.holders == 0 {
		c.percent = debug.SetGCPercent(-1)
	}
	c.holders++
	return sync.OnceFunc(func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.holders--; c.holders == 0 {
			debug.SetGCPercent(c.percent)
		}
	})
}
