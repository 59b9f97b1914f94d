// SPDX-License-Identifier: Apache-2.0

package pagesrv

import (
	"sync/atomic"
	"time"

	"github.com/migrated-vm/migrated/pkg/pagewire"
)

const (
	// copying is what a byte costs at least, in ns, on both hosts together, on a link of unlimited speed like the
	// loopback: it is copied into the socket and out of it, and by gRPC. BenchmarkPacking shows it, with memory that packs
	// to nothing: the processors' time for a byte sent raw, minus the time for a byte sent packed, plus the part of the
	// latter that packing and unpacking took.
	copying = 0.5

	// linkReply is the smallest reply, in bytes of pages, from which the speed of the link is learned: half of the
	// shortest run that the sweep asks for. In a smaller one the message takes the time, not its bytes.
	linkReply = 32 << 10

	// linkMemory is how many bytes it takes for a measurement to be largely forgotten.
	linkMemory = 4 << 20

	// linkGrowth bounds how many times slower one reply may make the link look than it is known to be, because an
	// interrupted goroutine looks like a slow link.
	linkGrowth = 8
)

// A link is what the lanes of an export know of the network. All lanes go to one peer, so what the bulk lane finds out
// is good for all. If two lanes write at once, one of the measurements is lost, which does no harm.
type link struct {
	ps atomic.Int64 // per byte; below copying: nothing known
}

// cost is what a byte on the wire costs, in ns.
func (l *link) cost() float64 { return max(copying, float64(l.ps.Load())/1000) }

// learn updates the cost. took is the time between two replies, and waited the part of it spent waiting for the
// network. The second reply had size bytes of pages, sent as carried bytes.
func (l *link) learn(size, carried int, took, waited time.Duration) {
	l.ps.Store(int64(1000 * averaged(l.cost(), size, carried, took, waited)))
}

// averaged is the average of what a byte costs, weighted by bytes. What a link once showed is forgotten only after
// about linkMemory bytes have been sent without waiting.
//
// If the lane waits a lot, the network is the bottleneck. Then all of the time counts as the network's, because the
// network goes on sending what is in the buffers while we read and pack. If the lane hardly waits, it learns only that
// the network is not slower than we are. If few bytes were sent for many pages, the lane has rather waited for the
// receiver, which was busy with the pages.
func averaged(cost float64, size, carried int, took, waited time.Duration) float64 {
	if waited < took/4 {
		took = waited
	}
	now := min(float64(took)/float64(max(1, carried)), linkGrowth*cost)
	if carried < size/4 {
		now = min(now, cost)
	}
	return cost + (now-cost)*float64(carried)/float64(carried+linkMemory)
}

// A pacedStream is the stream of a bulk lane. It measures how long the lane waits for the network. The lane waits in
// Send while the buffers on the way are full. It waits in Recv because the sweep asks for more only when it has got
// what it asked for before. On a slow link most of the waiting is in Recv, because all that the sweep may ask for at
// once fits into the buffers. (A receiver that is slower than the network would show in the same way.)
type pacedStream struct {
	messageStream
	link   *link
	last   time.Time     // when the last reply had been sent; zero unless it was large enough
	waited time.Duration // since then
}

func (s *pacedStream) Recv(request *pagewire.Request) error {
	began := time.Now()
	err := s.messageStream.Recv(request)
	s.waited += time.Since(began)
	return err
}

func (s *pacedStream) Send(reply *pagewire.Reply) error {
	size, carried := len(reply.Data), reply.Carried()
	began := time.Now()
	err := s.messageStream.Send(reply)
	end := time.Now()
	s.waited += end.Sub(began)
	if size < linkReply {
		s.last = time.Time{}
		return err
	}
	if !s.last.IsZero() {
		s.link.learn(size, carried, end.Sub(s.last), s.waited)
	}
	s.last, s.waited = end, 0
	return err
}
