// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/migrated-vm/migrated/pkg/pagewire"
	"github.com/migrated-vm/migrated/pkg/uffd"
)

// Lane is a call of PageService.Fetch, as a *pagelane.Client is. One goroutine sends and another receives. On a bulk
// lane one goroutine does both, so the lane has to take in what comes while it waits to send.
type Lane interface {
	Send(*pagewire.Request) error // io.EOF: the call is over, and Recv says why
	Recv(*pagewire.Reply) error
	CloseSend() error
	// Abort ends the call at once, whatever the peer does: calls of the other methods that are under way return.
	Abort()
}

// lane is a Lane in use by one session.
type lane struct {
	name   string
	stream Lane
	asked  atomic.Int64   // bytes asked for and not answered
	bytes  *atomic.Uint64 // counters of this kind of lane
	pages  *atomic.Uint64
	record *uffd.CopyRecord // owned by the receiver
	bulk   *bulkLane        // nil: a demand lane

	reply pagewire.Reply // owned by the receiver
	ended chan struct{}  // closed when the receiver has ended
}

// lost returns err as an error of the engine: ErrProtocol if a message was malformed, else ErrLaneLost.
func (l *lane) lost(err error) error {
	if errors.Is(err, pagewire.ErrMalformed) {
		return fmt.Errorf("%s: %w: %w", l.name, ErrProtocol, err)
	}
	return fmt.Errorf("%s: %w: %w", l.name, ErrLaneLost, err)
}

// session is one Run.
type session struct {
	e       *Engine
	demand  []*lane
	bulk    bulk
	workers []*worker

	ctx    context.Context //nolint:containedctx // it is the life of this struct
	fail   context.CancelCauseFunc
	asking sync.WaitGroup // the workers, and the goroutines that open lanes
}

// Run fills the memory over these lanes until the last page is in; then nothing is registered any more and it returns
// nil. There must be one demand lane for each worker. Faults are answered at once, the sweep waits for StartSweep. The
// errors are those of this package, context.Cause(ctx), or what the kernel said; after each of them Run may be called
// again, with new lanes, and goes on where it was. In between nobody answers faults or reads events. If no page is
// missing, Run needs no lanes and uses none.
//
// Where more bulk lanes make the sweep faster, Run opens them by more, at most 8 in all and at most one for each
// processor. Run owns the lane that more returns; more may take until its ctx ends. If more is nil, there is one bulk
// lane. Run does not end when one of several bulk lanes is lost.
//
// At its end Run closes the lanes for sending and waits for the source to end them, but not longer than a second. Then
// it aborts them, so that nothing of Run waits for the source any more when it returns.
func (e *Engine) Run(ctx context.Context, demand []Lane, bulk Lane, more func(context.Context) (Lane, error)) error {
	if !e.running.CompareAndSwap(false, true) {
		return ErrRunning
	}
	defer e.running.Store(false)
	select {
	case <-e.done:
		return nil
	default:
	}
	if e.pages.left.Load() == 0 { // it was taken up like this: an earlier process ended before it could say so
		return errors.Join(e.resume(), e.complete(ctx))
	}
	if len(demand) != e.workers {
		return fmt.Errorf("post-copy: %d demand lanes for %d fault workers", len(demand), e.workers)
	}
	s := &session{e: e}
	s.bulk.open, s.bulk.pace, s.bulk.fronts, s.bulk.missing = more, newPace(e.budget), fronts{firsts: e.firsts()}, true
	s.bulk.scale = scale{lanes: 1, most: 1}
	if more != nil && e.bulkLanes == 0 {
		s.bulk.scale.most = e.mostLanes()
	}
	s.ctx, s.fail = context.WithCancelCause(ctx)
	defer s.fail(nil)
	c := &e.counters
	for i, stream := range demand {
		s.demand = append(s.demand, newLane(
			fmt.Sprintf("demand lane %d", i), stream, &c.demandBytes, &c.demandPages, &e.copies[i],
		))
	}
	s.newBulk(bulk)
	for _, l := range s.demand {
		w, err := newWorker(s, l)
		if err != nil {
			return err
		}
		e.sleeps(1)
		defer e.sleeps(-1)
		defer w.poller.close()
		s.workers = append(s.workers, w)
	}

	// What an earlier session had asked for will not come any more. Threads whose messages that session had read look
	// again: their faults come first now.
	e.fastest.take() // perhaps it was measured on another path
	e.later.open()
	defer e.later.stop()
	e.pages.putBack()
	s.setAside()
	if err := errors.Join(e.resume(), e.wakeAll()); err != nil {
		return err
	}
	e.counters.lanes(1)
	defer e.counters.lanes(0)
	s.start()
	select {
	case <-e.pages.full:
		e.counters.lastPage.Store(e.now())
	case <-s.ctx.Done():
	}
	return s.finish(ctx)
}

func newLane(name string, stream Lane, bytes, pages *atomic.Uint64, record *uffd.CopyRecord) *lane {
	return &lane{name: name, stream: stream, bytes: bytes, pages: pages, record: record, ended: make(chan struct{})}
}

func (e *Engine) wakeAll() error {
	for i := range e.blocks {
		if err := e.blocks[i].UFFD.Wake(e.blocks[i].all()); err != nil {
			return explain(&e.blocks[i], e.blocks[i].Addr, err)
		}
	}
	return nil
}

func (s *session) start() {
	for _, l := range s.demand {
		go s.receive(l)
	}
	go s.sweep(s.bulk.lanes[0], true)
	for _, w := range s.workers {
		s.asking.Go(func() {
			s.end(w.run()) // first: it says more than the end of the lane
			_ = w.lane.stream.CloseSend()
		})
	}
}

// end ends the session with err, unless err is nil.
func (s *session) end(err error) {
	if err != nil {
		s.fail(err)
	}
}

// receive deals with what comes on a demand lane until that ends.
func (s *session) receive(l *lane) {
	defer close(l.ended)
	defer l.reply.Release()
	for s.take(l) {
	}
}

// take is step 5: it waits for one reply and deals with it. It says false when there will be no more.
func (s *session) take(l *lane) bool {
	if err := l.stream.Recv(&l.reply); err != nil {
		s.lose(l, err)
		return false
	}
	s.e.at("reply", 0)
	if err := s.accept(l); err != nil {
		s.end(fmt.Errorf("%s: %w", l.name, err))
		return false
	}
	return true
}

// finish ends all goroutines and returns the error of Run. ctx is Run's.
func (s *session) finish(ctx context.Context) error {
	err := context.Cause(s.ctx) // before this ends it
	s.fail(nil)
	s.e.at("ending", 0)
	for _, w := range s.workers {
		w.poller.stop()
	}
	s.bulk.close()
	// A sender may wait for a window that nobody opens, or for a peer that takes nothing.
	grace := time.AfterFunc(laneGrace, s.abort)
	defer grace.Stop()
	s.asking.Wait()
	select {
	case <-s.e.pages.full: // all pages are in, so that a failure meanwhile does not matter
		if !errors.Is(err, ErrMoved) { // else pages that the table calls present were moved away
			err = s.e.complete(ctx)
		}
	default:
	}
	for _, l := range s.all() {
		<-l.ended
	}
	return err
}

func (s *session) all() []*lane {
	return append(s.demand[:len(s.demand):len(s.demand)], s.bulk.all()...)
}

// abort ends the lanes, even if goroutines wait in them.
func (s *session) abort() {
	for _, l := range s.all() {
		l.stream.Abort()
	}
}
