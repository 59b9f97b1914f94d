// SPDX-License-Identifier: Apache-2.0

package pagesrv

import "sync/atomic"

// Stats are counters of what an export or a lane has served.
type Stats struct {
	Lanes     int    // open now
	Requests  uint64 // messages with ranges
	Replies   uint64 // messages with runs
	Pages     uint64 // all pages, in the block's page size
	ZeroPages uint64 // how many of them are zero; no bytes are sent for these
	LostPages uint64 // how many of them cannot be read
	HolePages uint64 // reported as holes without being asked for; counted each time
	PageBytes uint64 // of the pages whose bytes were sent
	Bytes     uint64 // sent for them, fewer where they were packed; without any framing
	Throttled uint64 // requests that had to wait, because far more was asked for than there is
}

// LaneStats are the figures of one open lane.
type LaneStats struct {
	Peer string // network address
	Stats
}

// Stats returns the sums over all lanes, also those that have ended.
func (e *Export) Stats() Stats {
	e.mu.Lock()
	defer e.mu.Unlock()
	sum := e.past
	for l := range e.lanes {
		sum.add(l.counters.load())
	}
	sum.Lanes = len(e.lanes)
	return sum
}

// Lanes returns the figures of each open lane, in no order.
func (e *Export) Lanes() []LaneStats {
	e.mu.Lock()
	defer e.mu.Unlock()
	all := make([]LaneStats, 0, len(e.lanes))
	for l := range e.lanes {
		s := l.counters.load()
		s.Lanes = 1
		all = append(all, LaneStats{l.peer, s})
	}
	return all
}

func (s *Stats) add(o Stats) {
	s.Requests += o.Requests
	s.Replies += o.Replies
	s.Pages += o.Pages
	s.ZeroPages += o.ZeroPages
	s.LostPages += o.LostPages
	s.HolePages += o.HolePages
	s.PageBytes += o.PageBytes
	s.Bytes += o.Bytes
	s.Throttled += o.Throttled
}

// counters are written by one lane only. Any goroutine may read them.
type counters struct {
	requests, replies, pages, zeroPages, lostPages, holePages, pageBytes, bytes, throttled atomic.Uint64
}

func (c *counters) load() Stats {
	return Stats{
		Requests: c.requests.Load(), Replies: c.replies.Load(),
		Pages: c.pages.Load(), ZeroPages: c.zeroPages.Load(), LostPages: c.lostPages.Load(), HolePages: c.holePages.Load(),
		PageBytes: c.pageBytes.Load(), Bytes: c.bytes.Load(), Throttled: c.throttled.Load(),
	}
}
