// SPDX-License-Identifier: Apache-2.0

package pagesrv

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// sender is an export with a bulk lane that sends replies of one size as fast as it may.
type sender struct {
	export  *Export
	replies atomic.Int64
}

const sharedReply = 10_000

func (s *sender) send(ctx context.Context, shared *shared) {
	turn := newTurn()
	for shared.wait(ctx, s.export, turn, sharedReply) == nil {
		s.replies.Add(1)
	}
}

func senders(weights ...float64) (all []*sender) {
	for _, w := range weights {
		all = append(all, &sender{export: &Export{weight: w}})
	}
	return all
}

// TestSharedByWeight: the rate is not exceeded, and each export gets the part of it that its weight says.
func TestSharedByWeight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s shared
		s.setRate(1_000_000)
		ctx, cancel := context.WithCancel(t.Context())
		all := senders(1, 1, 3)
		for _, one := range all {
			go one.send(ctx, &s)
		}
		time.Sleep(10 * time.Second)
		synctest.Wait()
		sum := int64(0)
		for i, want := range []int64{200, 200, 600} {
			got := all[i].replies.Load()
			sum += got
			if got < want-3 || got > want+3 {
				t.Errorf("export %d of weight %v sent %d replies, of which %d are its part", i, all[i].export.weight, got, want)
			}
		}
		if sum < 999 || sum > 1002 {
			t.Errorf("%d replies of %d bytes went in 10 s of 1 MB a second", sum, sharedReply)
		}
		cancel()
	})
}

// TestSharedIsLeft: what one export does not use goes to the other one. It gets nothing for that later.
func TestSharedIsLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s shared
		s.setRate(1_000_000)
		ctx, cancel := context.WithCancel(t.Context())
		all := senders(1, 1)
		go all[0].send(ctx, &s)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		alone := all[0].replies.Load()
		if alone < 499 || alone > 502 {
			t.Errorf("alone, it sent %d replies in 5 s, not all of the rate's 500", alone)
		}
		go all[1].send(ctx, &s)
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if late := all[1].replies.Load(); late < 98 || late > 102 {
			t.Errorf("who came later sent %d replies in 2 s, where its half are 100", late)
		}
		cancel()
	})
}

// TestSharedChanges: a new rate holds at once, also for replies that wait already.
func TestSharedChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s shared
		s.setRate(1) // a reply would take hours
		ctx, cancel := context.WithCancel(t.Context())
		one := senders(1)[0]
		go one.send(ctx, &s)
		time.Sleep(time.Minute)
		synctest.Wait()
		if n := one.replies.Load(); n != 1 {
			t.Fatalf("%d replies", n)
		}
		s.setRate(1_000_000)
		time.Sleep(time.Second)
		synctest.Wait()
		if n := one.replies.Load(); n < 100 || n > 103 {
			t.Errorf("%d replies after a second of the new rate", n)
		}
		cancel()
	})
}

// TestSharedIsGivenUp: a lane that ends while it waits does not delay the others.
func TestSharedIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s shared
		s.setRate(sharedReply) // one reply a second
		all := senders(1, 1)
		first := newTurn()
		if err := s.wait(t.Context(), all[0].export, first, sharedReply); err != nil {
			t.Fatal(err)
		}
		why := errors.New("withdrawn")
		ctx, cancel := context.WithCancelCause(t.Context())
		ended := make(chan error)
		go func() { ended <- s.wait(ctx, all[0].export, first, sharedReply) }()
		synctest.Wait()
		cancel(why)
		if err := <-ended; !errors.Is(err, why) {
			t.Fatalf("ended with %v", err)
		}
		began := time.Now()
		if err := s.wait(t.Context(), all[1].export, newTurn(), sharedReply); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took > time.Second { // by the clock of the synctest bubble
			t.Errorf("the next waited %v for a reply that was never sent", took)
		}
	})
}

func TestSharingDoesNotAllocate(t *testing.T) {
	for name, rate := range map[string]uint64{"no limit": 0, "limit": 1 << 60} {
		var s shared
		s.setRate(rate)
		e, turn := &Export{weight: 1}, newTurn()
		_ = s.wait(t.Context(), e, turn, sharedReply)
		if n := testing.AllocsPerRun(1000, func() { _ = s.wait(t.Context(), e, turn, sharedReply) }); n != 0 {
			t.Errorf("%s: %v allocations for a reply", name, n)
		}
	}
}
