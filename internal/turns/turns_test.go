// SPDX-License-Identifier: Apache-2.0

package turns

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
)

// places counts the free places.
type places struct{ left atomic.Int32 }

func (p *places) take() bool {
	if p.left.Load() == 0 {
		return false
	}
	p.left.Add(-1)
	return true
}

// queued calls Wait in a goroutine, and returns when it waits. The channel receives what Wait returns.
func queued(t *testing.T, ctx context.Context, q *Queue, take func() bool) <-chan error { //nolint:revive // t first
	t.Helper()
	result, waits := make(chan error, 1), make(chan struct{})
	var once atomic.Bool
	go func() {
		result <- q.Wait(ctx, take, func(int) {
			if once.CompareAndSwap(false, true) {
				close(waits)
			}
		})
	}()
	<-waits
	return result
}

func TestFirstComeFirstServed(t *testing.T) {
	var q Queue
	var p places
	var served []int
	var results []<-chan error
	for i := range 5 {
		results = append(results, queued(t, t.Context(), &q, func() bool {
			took := p.take()
			if took {
				served = append(served, i) // under the queue's lock
			}
			return took
		}))
	}
	p.left.Store(2)
	q.Advance()
	for _, r := range results[:2] {
		if err := <-r; err != nil {
			t.Fatal(err)
		}
	}
	q.mu.Lock()
	n := len(q.waiting)
	q.mu.Unlock()
	if n != 3 {
		t.Errorf("%d wait, instead of 3", n)
	}
	p.left.Store(3)
	q.Advance()
	for _, r := range results[2:] {
		if err := <-r; err != nil {
			t.Fatal(err)
		}
	}
	for i, who := range served {
		if i != who {
			t.Fatalf("served %v", served)
		}
	}
}

// TestPassesBy: a caller that cannot take a place yet does not hold up later ones.
func TestPassesBy(t *testing.T) {
	var q Queue
	var p places
	first := queued(t, t.Context(), &q, func() bool { return false })
	second := queued(t, t.Context(), &q, p.take)
	p.left.Store(1)
	q.Advance()
	if err := <-second; err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-first:
		t.Fatalf("served without a place: %v", err)
	default:
	}
}

func TestLeaves(t *testing.T) {
	var q Queue
	var p places
	gone := errors.New("cancelled")
	ctx, cancel := context.WithCancelCause(t.Context())
	first := queued(t, ctx, &q, p.take)
	second := queued(t, t.Context(), &q, p.take)
	cancel(gone)
	if err := <-first; !errors.Is(err, gone) {
		t.Fatalf("left with %v", err)
	}
	p.left.Store(1)
	q.Advance()
	if err := <-second; err != nil {
		t.Fatal(err)
	}
	if left := p.left.Load(); left != 0 {
		t.Errorf("%d places are left: who had gone took none, who waited did not", left)
	}
}

func TestBounded(t *testing.T) {
	q := Queue{Most: 1}
	var p places
	first := queued(t, t.Context(), &q, p.take)
	if err := q.Wait(t.Context(), p.take, nil); !errors.Is(err, ErrFull) {
		t.Fatalf("beyond the bound: %v", err)
	}
	p.left.Store(1)
	q.Advance()
	if err := <-first; err != nil {
		t.Fatal(err)
	}
}

// TestSaysWhereItStands: ahead is called when callers before have left.
func TestSaysWhereItStands(t *testing.T) {
	var q Queue
	var p places
	ctx, cancel := context.WithCancel(t.Context())
	first := queued(t, ctx, &q, p.take)
	told := make(chan int, 8)
	done := make(chan error, 1)
	go func() { done <- q.Wait(t.Context(), p.take, func(n int) { told <- n }) }()
	if n := <-told; n != 1 {
		t.Fatalf("told %d first, instead of 1", n)
	}
	cancel()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Fatalf("who left: %v", err)
	}
	q.Advance()
	if n := <-told; n != 0 {
		t.Fatalf("told %d then, instead of 0", n)
	}
	p.left.Store(1)
	q.Advance()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}
