// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"math"
	"sync/atomic"
)

// budget is what pages that no thread waits for may take of the network: so many bytes a second, as packed as they come.
// Faults neither ask it nor count: who waits for a page does not wait for the budget, and what it costs is no reason to
// leave the rest of the memory behind for longer.
//
//	sweep, guesses ── wait: is all paid? ──► asked for ──► answered ── spend: due += bytes / limit
//
// It is paid afterwards, because only what came tells how well it packs: pages that come while nothing is due may be as
// many as pace.go lets be in flight. In any span of time no more comes than the limit's share of it, and of budgetCredit,
// and those.
//
// spend may be called by anybody.
type budget struct {
	limit atomic.Uint64 // bytes a second; 0: none
	due   atomic.Int64  // ns of the engine's clock: when what has come is paid
	// weight is how many bytes a byte of RAM took on the bulk lane of late, as the bits of a float64. Its receiver sets it.
	weight  atomic.Uint64
	changed chan struct{} // the limit is another; holds one
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

// forgive forgets what is due: after a change of the limit it is of another rate.
func (b *budget) forgive() {
	b.due.Store(0)
	select {
	case b.changed <- struct{}{}:
	default: // said already, and not yet heard
	}
}

// wait is for how many ns, from now on, nothing may be asked for; 0: it may.
func (b *budget) wait(now int64) int64 {
	if b.limit.Load() == 0 {
		return 0
	}
	return max(0, b.due.Load()-now)
}

// spend says that so many bytes came at now.
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

// weigh takes in that so many bytes of RAM took carried bytes.
func (b *budget) weigh(ram, carried int64) {
	weight := b.weighs()
	weight += (float64(carried)/float64(max(1, ram)) - weight) / 8
	b.weight.Store(math.Float64bits(weight))
}

func (b *budget) weighs() float64 { return math.Float64frombits(b.weight.Load()) }

// most is how many bytes may be in flight while nothing is known of them: those of budgetBurst, or two runs.
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
