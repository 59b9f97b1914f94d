// SPDX-License-Identifier: Apache-2.0

// Package pace has what all of the guest's work shares: it is done at a rate, rests on demand, and reports how long its
// slowest piece took.
package pace

import (
	"sync"
	"sync/atomic"
	"time"
)

// MaxBehind bounds the burst with which work catches up with its rate after a stall.
const MaxBehind = 100 * time.Millisecond

// A Worker does one piece of work after the other while it is on. It is off at first.
type Worker struct {
	interval time.Duration // between two pieces; 0: none

	mu     sync.Mutex // of on; held during a piece of work
	resume sync.Cond
	on     bool
}

// New returns a worker whose pieces of work begin at that interval; 0: each follows the one before it at once.
func New(interval time.Duration) *Worker {
	w := &Worker{interval: interval}
	w.resume.L = &w.mu
	return w
}

// Run calls work for each piece. It does not return.
func (w *Worker) Run(work func()) {
	next := time.Now()
	for {
		w.mu.Lock()
		for !w.on {
			w.resume.Wait()
		}
		work()
		w.mu.Unlock()
		if w.interval == 0 {
			continue
		}
		now := time.Now()
		if behind := now.Add(-MaxBehind); next.Before(behind) {
			next = behind
		}
		next = next.Add(w.interval)
		time.Sleep(next.Sub(now))
	}
}

// Set makes the worker work or rest. It returns when the worker does.
func (w *Worker) Set(on bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.on = on
	w.resume.Broadcast()
}

// Between calls f between two pieces of work.
func (w *Worker) Between(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
}

// Slowest is the longest time that a piece of work took. Any goroutine may use it.
type Slowest struct{ ns atomic.Int64 }

// Note records how long a piece took.
func (s *Slowest) Note(took time.Duration) {
	for {
		old := s.ns.Load()
		if int64(took) <= old || s.ns.CompareAndSwap(old, int64(took)) {
			return
		}
	}
}

// Take returns the longest time since the last call of Take.
func (s *Slowest) Take() time.Duration { return time.Duration(s.ns.Swap(0)) }
