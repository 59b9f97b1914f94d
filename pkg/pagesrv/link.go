// SPDX-License-Identifier: Apache-2.0

package pagesrv

import (
	"sync/atomic"
	"time"

	"github.com/migrated-vm/migrated/internal/pagewire"
)

const (
	// copying is what a byte costs at least, in ns, both hosts together, on a link without end like
	// the loopback: to be copied into the socket and out of it, and by gRPC. BenchmarkPacking shows
	// it: what a byte of memory that packs to nothing takes of the processors' time raw, less
	// what it takes packed, and back what the packing and unpacking took of that.
	copying = 0.5

	// linkReply is the smallest reply, in bytes of pages, from which the speed of the link is learned: half of the
	// shortest run that the sweep asks for. Of a smaller one, what takes time is the message, not its bytes.
	linkReply = 32 << 10

	// linkMemory is how many bytes it takes for a measurement to be largely forgotten.
	linkMemory = 4 << 20

	// linkGrowth bounds how many times slower than known one reply may make the link look: an
	// interrupted goroutine looks like a slow link.
	linkGrowth = 8
)

// A link is what the lanes of an export know of the network. All lanes go to one peer, so what the bulk lane
// finds out is good for all. Two that write at once lose one of the measurements: no harm.
type link struct {
	ps atomic.Int64 // per byte; below copying: nothing known
}

// cost is what a byte on the wire costs, in ns.
func (l *link) cost() float64 { return max(copying, float64(l.ps.Load())/1000) }

// learn takes into account that it took so long from one reply to the next one, which had size bytes of pages in
// carried bytes, and that waited of it was spent waiting for the network.
func (l *link) learn(size, carried int, took, waited time.Duration) {
	l.ps.Store(int64(1000 * averaged(l.cost(), size, carried, took, waited)))
}

// averaged is the average of what a byte costs, weighted by bytes: what a link once showed is not forgotten
// before about linkMemory bytes have been sent without waiting.
//
// Who waits a lot is slower than the network by nothing: then all of the time is the network's, which
// goes on sending what is in the buffers while we read and pack. Who hardly waits learns only that the network is
// not slower than we are. And when few bytes were sent for many pages, it is rather the receiver, busy with the
// pages, that was waited for.
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

// A pacedStream is the stream of a bulk lane. It measures how long the lane waits for the network: in SendMsg,
// while the buffers on the way are full, and in RecvMsg, as the sweep asks for more when it has got what it
// asked for before. The latter is what a slow link mostly shows: all that the sweep may ask for at once
// fits into the buffers. (It would show a receiver that is slower than the network as well.)
type pacedStream struct {
	messageStream
	link   *link
	last   time.Time     // when the last reply had been sent; zero unless it was large enough
	waited time.Duration // since then
}

func (s *pacedStream) RecvMsg(m any) error {
	began := time.Now()
	err := s.messageStream.RecvMsg(m)
	s.waited += time.Since(began)
	return err
}

func (s *pacedStream) SendMsg(m any) error {
	reply := m.(*pagewire.Reply) // a lane sends nothing else
	size, carried := len(reply.Data), reply.Carried()
	began := time.Now()
	err := s.messageStream.SendMsg(m)
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
