// SPDX-License-Identifier: Apache-2.0

// Package schedule keeps a goroutine that sleeps in system calls out of the way of the runtime's monitor.
//
// A goroutine in a system call keeps its processor. If it has kept the processor for 10 ms and the scheduler does not
// know of it, it loses the processor as soon as it is in a system call (retake in runtime/proc.go, as of Go 1.26). Then
// the monitor looks again each 20 µs, and finds the next such goroutine. In the middle of a migration the monitor was
// woken 6,000 times a second, a sixth of all CPU time that the daemons took. So a Sleeper goes to the scheduler by
// itself now and then.
package schedule

import (
	"runtime"
	"time"
)

// turn is after how long a Sleeper goes to the scheduler: half of what the monitor allows.
const turn = 5 * time.Millisecond

// A Sleeper is a goroutine that sleeps in system calls. Its zero value is ready; one goroutine uses it.
type Sleeper struct{ last time.Time }

// Woke says that a system call has returned.
func (s *Sleeper) Woke() {
	if now := time.Now(); now.Sub(s.last) >= turn {
		s.last = now
		runtime.Gosched()
	}
}
