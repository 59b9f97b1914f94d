// SPDX-License-Identifier: Apache-2.0

// Package gomaxprocs raises GOMAXPROCS by one for each thread that sleeps in system calls during a migration.
//
// A goroutine in a system call keeps its processor (P) of Go's runtime. If no other goroutine needs that
// P, the goroutine continues with it when the call returns, and waking it costs only the waking of a
// thread. If there are too few Ps, the runtime takes the P away after 20 µs, gives it to another thread,
// and the goroutine has to get one again. That is slower than the runtime's poller, which avoids such
// system calls. More Ps than CPUs do not make more threads run at once, because these threads sleep.
package gomaxprocs

import (
	"runtime"
	"sync"
)

const (
	step = 8   // GOMAXPROCS is raised by this much at a time, because each change stops the world for about 20 µs
	most = 128 // the most processors that are added
)

var (
	mu       sync.Mutex
	own      int // GOMAXPROCS before the first sleeper
	sleepers int
	granted  int // processors that were added to own
)

// Add adds n sleeping threads, or removes them if n is negative. GOMAXPROCS is never lowered: a processor that is not
// used costs nothing.
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
