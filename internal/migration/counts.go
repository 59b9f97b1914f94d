// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"sync"
	"sync/atomic"

	"github.com/migrated-vm/migrated/pkg/postcopy"
)

// Counts is what was counted of pages that came to this host. None of it falls.
type Counts struct {
	Faults                            postcopy.Causes
	Latency                           postcopy.Durations // of faults
	DemandPages, BulkPages            uint64             // answered, by kind of lane
	ZeroPages                         uint64             // of these
	GuessedPages                      uint64
	TouchedPages, UnexplainedPages    uint64
	DemandBytes, BulkBytes            uint64 // as packed as they came
	UnpackedBytes                     uint64 // that these were
	DiscardedBytes, LaneReconnections uint64
}

// Add adds all of o.
func (c *Counts) Add(o *Counts) {
	c.Faults.Missing += o.Faults.Missing
	c.Faults.Swept += o.Faults.Swept
	c.Faults.Ahead += o.Faults.Ahead
	c.Faults.Waiting += o.Faults.Waiting
	c.Faults.Zero += o.Faults.Zero
	c.Faults.Present += o.Faults.Present
	c.Latency.Add(&o.Latency)
	c.DemandPages += o.DemandPages
	c.BulkPages += o.BulkPages
	c.ZeroPages += o.ZeroPages
	c.GuessedPages += o.GuessedPages
	c.TouchedPages += o.TouchedPages
	c.UnexplainedPages += o.UnexplainedPages
	c.DemandBytes += o.DemandBytes
	c.BulkBytes += o.BulkBytes
	c.UnpackedBytes += o.UnpackedBytes
	c.DiscardedBytes += o.DiscardedBytes
	c.LaneReconnections += o.LaneReconnections
}

// counted is where the counts of one migration are: in its engine, and those that it had for QEMUs before.
type counted struct {
	reconnects atomic.Uint64

	mu      sync.Mutex // never held by who answers a fault
	engines []*postcopy.Engine
}

func (c *counted) add(e *postcopy.Engine) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.engines = append(c.engines, e)
}

// last is the engine that fills the memory now, or did; nil: there was none.
func (c *counted) last() *postcopy.Engine {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.engines) == 0 {
		return nil
	}
	return c.engines[len(c.engines)-1]
}

// AddCounts adds what was counted of this migration so far. It reads what the engine counts for itself.
func (d *Destination) AddCounts(to *Counts) {
	d.counted.mu.Lock()
	defer d.counted.mu.Unlock()
	for _, e := range d.counted.engines {
		s := e.Stats()
		to.Add(&Counts{
			Faults: s.Causes, DemandPages: s.DemandPages, BulkPages: s.BulkPages, ZeroPages: s.PagesZero,
			GuessedPages: s.Guessed, TouchedPages: s.PagesTouched, UnexplainedPages: s.PagesUnexplained,
			DemandBytes: s.DemandBytes, BulkBytes: s.BytesReceived - s.DemandBytes, UnpackedBytes: s.PageBytes,
			DiscardedBytes: s.Discarded,
		})
		e.AddLatency(&to.Latency)
	}
	to.LaneReconnections += d.counted.reconnects.Load()
}
