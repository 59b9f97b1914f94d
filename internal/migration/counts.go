// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"errors"
	"sync"
	"sync/atomic"

	"github.com/migrated-vm/migrated/pkg/postcopy"
)

// Counts holds counters of the pages that came to this host. No counter decreases.
type Counts struct {
	Faults                            postcopy.Causes
	Latency                           postcopy.Durations // of faults
	DemandPages, BulkPages            uint64             // pages that came on lanes of each kind
	ZeroPages                         uint64             // of these, pages of zeros
	GuessedPages                      uint64
	TouchedPages, UnexplainedPages    uint64
	LostPages                         uint64
	DemandBytes, BulkBytes            uint64 // on the wire, packed
	UnpackedBytes                     uint64 // the same after unpacking
	DiscardedBytes, LaneReconnections uint64
	BulkLanesLost                     uint64 // while other lanes went on
	MostBulkLanes                     uint32 // at the same time, in one migration
}

// Add adds o to c. MostBulkLanes becomes the larger of the two.
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
	c.BulkLanesLost += o.BulkLanesLost
	c.MostBulkLanes = max(c.MostBulkLanes, o.MostBulkLanes)
	c.TouchedPages += o.TouchedPages
	c.UnexplainedPages += o.UnexplainedPages
	c.LostPages += o.LostPages
	c.DemandBytes += o.DemandBytes
	c.BulkBytes += o.BulkBytes
	c.UnpackedBytes += o.UnpackedBytes
	c.DiscardedBytes += o.DiscardedBytes
	c.LaneReconnections += o.LaneReconnections
}

// engineList holds the engines of one migration: the current one and those for QEMUs that were replaced. The counts are
// in the engines.
type engineList struct {
	reconnects atomic.Uint64

	mu  sync.Mutex // never held while a fault is answered
	all []*postcopy.Engine
}

func (c *engineList) add(e *postcopy.Engine) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.all = append(c.all, e)
}

// last returns the engine that fills the memory now, or did last; nil: there was none.
func (c *engineList) last() *postcopy.Engine {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.all) == 0 {
		return nil
	}
	return c.all[len(c.all)-1]
}

// close frees what the engines hold. None of them runs any more; their counts stay.
func (c *engineList) close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var errs []error
	for _, e := range c.all {
		errs = append(errs, e.Close())
	}
	return errors.Join(errs...)
}

// AddCounts adds the counts of this migration so far to to.
func (d *Destination) AddCounts(to *Counts) {
	d.engines.mu.Lock()
	defer d.engines.mu.Unlock()
	for _, e := range d.engines.all {
		s := e.Stats()
		to.Add(&Counts{
			Faults: s.Causes, DemandPages: s.DemandPages, BulkPages: s.BulkPages, ZeroPages: s.PagesZero,
			GuessedPages: s.Guessed, TouchedPages: s.PagesTouched, UnexplainedPages: s.PagesUnexplained,
			LostPages:   s.PagesLost,
			DemandBytes: s.DemandBytes, BulkBytes: s.BytesReceived - s.DemandBytes, UnpackedBytes: s.PageBytes,
			DiscardedBytes: s.Discarded, BulkLanesLost: s.BulkLanesLost, MostBulkLanes: uint32(s.MostBulkLanes),
		})
		e.AddLatency(&to.Latency)
	}
	to.LaneReconnections += d.engines.reconnects.Load()
}
