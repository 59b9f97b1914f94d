// SPDX-License-Identifier: Apache-2.0

// Package schedule keeps a goroutine that sleeps in system calls out of the way of the runtime's monitor.
//
// A goroutine in a system call keeps its processor (P). The runtime's monitor takes the P away in a system call, when
// the goroutine has not gone through the scheduler for 10 ms (retake in runtime/proc.go, as of Go 1.26). Then the
// monitor looks again every 20 µs, and finds the next such goroutine. In the middle of a migration it was woken 6,000
// times a second, a sixth of all CPU time of the daemons. So a Sleeper yields to the scheduler now and then.
package schedule

import (
	"runtime"
	"time"
)

// turn is the interval at which a Sleeper yields to the scheduler: half of what the monitor allows.
const turn = 5 * time.Millisecond

// A Sleeper is a goroutine that sleeps in system calls. Its zero value is ready; one goroutine uses it.
type Sleeper struct{ last time.Time }

// Woke yields to the scheduler if turn has passed. Call it after each system call.
func (s *Sleeper) Woke() {
	if now := time.Now(); now.Sub(s.last) >= turn {
		s.last = now
		runtime.Gosched()
	}
}
