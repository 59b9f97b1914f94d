// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"sync/atomic"
	"time"
)

// Stats are figures of an engine, over all calls of Run.
type Stats struct {
	PagesTotal   uint64 // of all blocks, each in its own page size
	PagesPresent uint64 // at the destination or known to be zero: equal to PagesTotal at the end
	PagesZero    uint64 // of PagesPresent, those that came as zero
	BytesTotal   uint64 // of all blocks

	BytesReceived uint64 // for pages on all lanes, as packed as they came, without framing; none for zero pages
	PageBytes     uint64 // of the pages that BytesReceived brought: more, where the source had packed them
	DemandBytes   uint64 // of BytesReceived, on demand lanes
	Bandwidth     uint64 // the limit for pages that no thread waits for, bytes a second; 0: none
	DemandPages   uint64 // answered on demand lanes, zero or not
	BulkPages     uint64 // answered on the bulk lane, zero or not

	// BulkLanes is how many bulk lanes the sweep uses now, 0 while there is no Run, and MostBulkLanes the most that it
	// has used. BulkLanesLost is how many were lost while others went on.
	BulkLanes, MostBulkLanes, BulkLanesLost uint64

	Faults uint64 // messages of threads that needed a page, repeated ones included
	Causes Causes // of Faults
	// Guessed is how many pages were asked for because a thread's faults predicted them. GuessHits is the share that was
	// right, from 0 to 1. Each page crosses the network once, as it would have anyway. A wrong guess only wastes a place
	// in the order.
	Guessed   uint64
	GuessHits float64
	// From a fault's message being read to its page being installed, to 1/16 exact.
	FaultP50, FaultP99, FaultMax time.Duration

	Discarded uint64 // bytes that the process gave up meanwhile (balloon, unmapping)

	// PagesTouched is how many pages another process had touched before their content came. They were written again, so
	// that the VM has the right content. PagesUnexplained counts such pages where that cannot be done: the VM may have
	// zeros there.
	PagesTouched, PagesUnexplained uint64

	// PagesLost is how many pages the source could not read. A thread that touches one gets SIGBUS.
	PagesLost uint64

	LastPage time.Time // when the last page was in; zero until then
}

// Causes says how many faults met a page in each state. A fault on a page of 1 GiB counts as Missing.
type Causes struct {
	Missing uint64 // nobody had asked for it
	Swept   uint64 // the sweep had asked for it, and it was asked for once more
	Ahead   uint64 // it was asked for because a thread's faults foretold it
	Waiting uint64 // another thread waited for it already, or it was being installed
	Zero    uint64 // it was known to be zero, and nothing crossed the network
	Present uint64 // it was there
}

// counters are what Stats is made of. All goroutines add to them, so no cache line matters more than another.
type counters struct {
	demandBytes, bulkBytes atomic.Uint64
	demandPages, bulkPages atomic.Uint64
	pageBytes              atomic.Uint64
	faults                 [claims]atomic.Uint64 // by what was to be done
	discarded              atomic.Uint64
	guessed                atomic.Uint64
	touched, unexplained   atomic.Uint64
	bulkLanes, mostLanes   atomic.Int64
	lanesLost              atomic.Uint64
	lastPage               atomic.Int64 // ns since the engine's epoch, 0 before
}

// lanes says how many bulk lanes are in use. One goroutine at a time calls it.
func (c *counters) lanes(n int) {
	if int64(n) == c.bulkLanes.Load() {
		return
	}
	c.bulkLanes.Store(int64(n))
	c.mostLanes.Store(max(c.mostLanes.Load(), int64(n)))
}

// Stats returns the current figures, at any time. Each is right, but not all are of one moment.
func (e *Engine) Stats() Stats {
	c := &e.counters
	s := Stats{
		PagesZero:   uint64(e.pages.zeros.Load()),
		PageBytes:   c.pageBytes.Load(),
		DemandBytes: c.demandBytes.Load(), Bandwidth: e.budget.limit.Load(),
		BulkLanes: uint64(c.bulkLanes.Load()), MostBulkLanes: uint64(c.mostLanes.Load()), BulkLanesLost: c.lanesLost.Load(),
		DemandPages: c.demandPages.Load(), BulkPages: c.bulkPages.Load(),
		Causes: Causes{
			Missing: c.faults[claimRequest].Load(), Swept: c.faults[claimAgain].Load(), Ahead: c.faults[claimWait].Load(),
			Waiting: c.faults[claimNothing].Load(), Zero: c.faults[claimZero].Load(),
			Present: c.faults[claimPresent].Load() + c.faults[claimLost].Load(),
		},
		FaultP50: e.latency.quantile(0.50), FaultP99: e.latency.quantile(0.99), FaultMax: time.Duration(e.latency.max.Load()),
		Guessed: c.guessed.Load(), GuessHits: e.predictor.hits(),
		Discarded:    c.discarded.Load(),
		PagesTouched: c.touched.Load(), PagesUnexplained: c.unexplained.Load(),
		PagesLost: uint64(e.pages.lost.Load()),
	}
	s.Faults = s.Causes.Missing + s.Causes.Swept + s.Causes.Ahead + s.Causes.Waiting + s.Causes.Zero + s.Causes.Present
	s.BytesReceived = s.DemandBytes + c.bulkBytes.Load()
	for i := range e.blocks {
		s.PagesTotal += e.blocks[i].pages
		s.BytesTotal += e.blocks[i].Size
	}
	s.PagesPresent = s.PagesTotal - uint64(e.pages.left.Load())
	if at := c.lastPage.Load(); at != 0 {
		s.LastPage = e.epoch.Add(time.Duration(at))
	}
	return s
}
