// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"math"
	"sync/atomic"
)

// budget limits the rate of pages that no thread waits for, in bytes a second, as packed. Faults do not use it. A
// thread that waits for a page does not wait for the budget, and the cost of that page does not delay the rest of the
// memory.
//
//	sweep, guesses ── wait: is all paid? ──► asked for ──► answered ── spend: due += bytes / limit
//
// A page is charged after it came, because its packed size is known only then. While nothing is due, only pace.go
// limits what is in flight. So in any span of time no more comes than the limit allows for that span and for
// budgetCredit, plus what pace.go lets be in flight.
//
// spend may be called from any goroutine.
type budget struct {
	limit atomic.Uint64 // bytes a second; 0: none
	due   atomic.Int64  // when all that has come will be paid for, in ns of the engine's clock
	// weight is the recent number of bytes on the bulk lanes per byte of RAM, as the bits of a float64. Their receivers
	// set it.
	weight  atomic.Uint64
	changed chan struct{} // the limit has changed; holds one
}

func newBudget(limit uint64) *budget {
	b := &budget{changed: make(chan struct{}, 1)}
	b.limit.Store(limit)
	b.weight.Store(math.Float64bits(1))
	return b
}

func (b *budget) set(limit uint64) {
	b.limit.Store(limit)
	b.forgive()
}

// forgive forgets what is due. It is called after a change of the limit: what is due was reckoned by the old limit.
func (b *budget) forgive() {
	b.due.Store(0)
	select {
	case b.changed <- struct{}{}:
	default: // already signalled
	}
}

// wait returns how many ns nothing may be asked for, from now on. 0: something may be asked for.
func (b *budget) wait(now int64) int64 {
	if b.limit.Load() == 0 {
		return 0
	}
	return max(0, b.due.Load()-now)
}

// spend charges the budget for bytes that came at now.
func (b *budget) spend(bytes, now int64) {
	limit := b.limit.Load()
	if limit == 0 || bytes == 0 {
		return
	}
	costs := int64(float64(bytes) * 1e9 / float64(limit))
	for {
		due := b.due.Load()
		if b.due.CompareAndSwap(due, max(due, now-budgetCredit.Nanoseconds())+costs) {
			break
		}
	}
	if b.limit.Load() != limit { // changed meanwhile, perhaps before this became due
		b.forgive()
	}
}

// weigh updates weight: ram bytes of RAM took carried bytes.
func (b *budget) weigh(ram, carried int64) {
	weight := b.weighs()
	weight += (float64(carried)/float64(max(1, ram)) - weight) / 8
	b.weight.Store(math.Float64bits(weight))
}

func (b *budget) weighs() float64 { return math.Float64frombits(b.weight.Load()) }

// most is how many bytes may be in flight while it is not known how they pack: those of budgetBurst, or two runs.
func (b *budget) most() int64 {
	limit := b.limit.Load()
	if limit == 0 {
		return math.MaxInt64
	}
	return max(2*leastRun, int64(float64(limit)*budgetBurst.Seconds()))
}

// rate is the limit in bytes of RAM a ns; infinite where there is none.
func (b *budget) rate() float64 {
	limit := b.limit.Load()
	if limit == 0 {
		return math.Inf(1)
	}
	return float64(limit) / 1e9 / max(b.weighs(), leastShare)
}
