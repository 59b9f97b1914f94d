// SPDX-License-Identifier: Apache-2.0

// Package turns is a queue of callers that wait for a place, first come first served.
package turns

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"
)

// advanceInterval is how often a waiting caller calls Advance. Places can become free without a call of Advance: a
// migration does not count while it waits for its other host.
const advanceInterval = time.Second

// ErrFull says that too many callers wait already.
var ErrFull = errors.New("too many wait already")

// A Queue has the callers that wait. Its zero value is empty.
type Queue struct {
	// Most is how many callers may wait; 0: any number.
	Most int

	mu      sync.Mutex
	waiting []*waiter
}

// A waiter is a caller that waits.
type waiter struct {
	take  func() bool
	taken chan struct{} // closed when take has returned true
	moved chan struct{} // has room for one; sent to when the queue may have moved
}

// Wait waits until take returns true, which means that it has taken a place. The queue calls the take of all callers
// that wait, in the order in which they came; one that cannot take a place does not hold up later ones. ahead, unless
// it is nil, is called with the number of callers that came before and still wait, whenever that changes. The error is
// ErrFull, or the cause of ctx; no place is taken then.
//
// take must be quick, and must not call the queue.
func (q *Queue) Wait(ctx context.Context, take func() bool, ahead func(n int)) error {
	w := &waiter{take: take, taken: make(chan struct{}), moved: make(chan struct{}, 1)}
	if err := q.join(w); err != nil {
		return err
	}
	q.Advance()
	ticker := time.NewTicker(advanceInterval)
	defer ticker.Stop()
	last := -1 // the last number that ahead was called with
	for {
		select {
		case <-w.taken:
			return nil
		default:
		}
		if n := q.before(w); n >= 0 && n != last && ahead != nil {
			last = n
			ahead(n)
		}
		select {
		case <-w.taken:
			return nil
		case <-w.moved:
		case <-ticker.C:
			q.Advance()
		case <-ctx.Done():
			if q.leave(w) {
				return context.Cause(ctx)
			}
			return nil // it took a place at the same moment
		}
	}
}

// Advance lets waiting callers take the places that have become free. Call it when one has.
func (q *Queue) Advance() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.waiting = slices.DeleteFunc(q.waiting, func(w *waiter) bool {
		if !w.take() {
			return false
		}
		close(w.taken)
		return true
	})
	for _, w := range q.waiting {
		select {
		case w.moved <- struct{}{}:
		default: // it has not read the last one yet
		}
	}
}

// join adds w, or returns ErrFull.
func (q *Queue) join(w *waiter) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.Most > 0 && len(q.waiting) >= q.Most {
		return ErrFull
	}
	q.waiting = append(q.waiting, w)
	return nil
}

// before returns the number of callers that wait and came before w; -1: w does not wait any more.
func (q *Queue) before(w *waiter) int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return slices.Index(q.waiting, w)
}

// leave removes w, and says whether it was still waiting.
func (q *Queue) leave(w *waiter) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	i := slices.Index(q.waiting, w)
	if i < 0 {
		return false
	}
	q.waiting = slices.Delete(q.waiting, i, i+1)
	return true
}
