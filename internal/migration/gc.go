// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"runtime/debug"
	"sync"
)

// A gcSwitch keeps Go's garbage collector from running during a switch. A collection at the wrong moment costs the
// switch more than all of its own work, because goroutines that allocate meanwhile have to help. A switch is bounded
// in time and allocates a megabyte or two.
type gcSwitch struct {
	mu      sync.Mutex
	holders int
	percent int // to be restored by the last holder
}

// processGC is the only gcSwitch: a process has one garbage collector.
var processGC gcSwitch

// hold disables collections until the returned function is called.
func (c *gcSwitch) hold() (release func()) {
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
