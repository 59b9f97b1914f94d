// SPDX-License-Identifier: Apache-2.0

// Package processors gives Go's runtime a processor (GOMAXPROCS) for each thread that sleeps in system calls for the length of
// a migration.
//
// A goroutine in a system call keeps its processor. Where nobody else wants that, it goes on with it when the call returns, and
// waking it costs what waking a thread costs. Where there are too few, the runtime's monitor takes the processor away after
// 20 µs, hands it to another thread, and the goroutine has to get one again: worse than the runtime's poller, which is
// there to avoid it. No more threads run at a time for there being more processors than CPUs: these sleep.
//
// One that has kept its processor for 10 ms without the scheduler's knowing loses it all the same, as soon as it is in a system
// call (retake in runtime/proc.go, as of Go 1.26). Then the monitor looks again each 20 µs, and finds the next: it was woken
// 6,000 times a second in the middle of a migration, a sixth of all that the daemons took. So a Sleeper goes to the scheduler
// by itself now and then.
package processors

import (
	"runtime"
	"sync"
	"time"
)

const (
	step = 8   // each change of GOMAXPROCS stops the world, for some 20 µs
	most = 128 // sleepers beyond that share
	// turn is after how long a Sleeper goes to the scheduler: half of what the monitor allows.
	turn = 5 * time.Millisecond
)

var (
	mu       sync.Mutex
	own      int // how many there were before the first sleeper
	sleepers int
	granted  int
)

// Add says that there are n sleepers more, or fewer where it is negative. What was once granted stays: a processor that nobody
// uses costs nothing.
func Add(n int) {
	mu.Lock()
	defer mu.Unlock()
	if own == 0 {
		own = runtime.GOMAXPROCS(0)
	}
	sleepers += n
	if want := min((sleepers+step-1)/step*step, most); want > granted {
		granted = want
		runtime.GOMAXPROCS(own + granted)
	}
}

// A Sleeper is a thread that sleeps in system calls. Its zero value is ready; one goroutine uses it.
type Sleeper struct{ last time.Time }

// Woke says that a system call has returned.
func (s *Sleeper) Woke() {
	if now := time.Now(); now.Sub(s.last) >= turn {
		s.last = now
		runtime.Gosched()
	}
}
