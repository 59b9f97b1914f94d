// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/migrated-vm/migrated/internal/pagewire"
	"github.com/migrated-vm/migrated/pkg/uffd"
)

// Lane is a call of PageService.Fetch: a *pagelane.Client, or gRPC's own on a connection that was dialled with
// pagewire.DialOptions. The engine sends *pagewire.Request and receives *pagewire.Reply. One goroutine sends and another receives,
// but for the bulk lane, where one does both; that lane is told by its method Alone, if it has it.
type Lane interface {
	SendMsg(request any) error // io.EOF: the call is over, and RecvMsg says why
	RecvMsg(reply any) error
	CloseSend() error
}

// lane is a Lane in use by one session.
type lane struct {
	name   string
	stream Lane
	asked  atomic.Int64   // bytes asked for and not answered
	bytes  *atomic.Uint64 // counters of this kind of lane
	pages  *atomic.Uint64
	record *uffd.CopyRecord // owned by the receiver

	reply pagewire.Reply // owned by the receiver
	state atomic.Int32   // of the receiver
	ended chan struct{}  // closed when the receiver has ended
}

// The receiver changes between the first two, Run ends that by the third.
const (
	busy      = iota // not waiting
	waiting          // in RecvMsg
	abandoned        // Run returns: whatever comes is nothing to us
)

// lost makes an error of what the lane said.
func (l *lane) lost(err error) error {
	if strings.Contains(err.Error(), pagewire.ErrMalformed.Error()) { // gRPC keeps only the text of a codec's error
		return fmt.Errorf("%s: %w: %w", l.name, ErrProtocol, err)
	}
	return fmt.Errorf("%s: %w: %w", l.name, ErrLaneLost, err)
}

// session is one Run.
type session struct {
	e       *Engine
	demand  []*lane
	bulk    *lane
	pace    *pace
	workers []*worker

	ctx    context.Context //nolint:containedctx // it is the life of this struct
	fail   context.CancelCauseFunc
	asking sync.WaitGroup // the workers
}

// Run fills the memory over these lanes until the last page is in; then nothing is registered any more and it
// returns nil. There must be one demand lane for each worker. Faults are answered at once, the sweep waits for
// StartSweep. The errors are those of this package, context.Cause(ctx), or what the kernel said; after each of them Run
// may be called again, with new lanes, and goes on where it was. In between nobody answers faults or reads events.
//
// The caller ends the lanes (by their context) when Run has returned. Run closes them for sending and waits for
// the source to end them, but not longer than a second: a receiver that still waits in RecvMsg
// then ends when the lane does and does nothing any more.
func (e *Engine) Run(ctx context.Context, demand []Lane, bulk Lane) error {
	if !e.running.CompareAndSwap(false, true) {
		return ErrRunning
	}
	defer e.running.Store(false)
	if len(demand) != e.workers {
		return fmt.Errorf("post-copy: %d demand lanes for %d fault workers", len(demand), e.workers)
	}
	select {
	case <-e.done:
		return nil
	default:
	}
	s := &session{e: e, pace: newPace(e.budget)}
	s.ctx, s.fail = context.WithCancelCause(ctx)
	defer s.fail(nil)
	c := &e.counters
	for i, stream := range demand {
		s.demand = append(s.demand, newLane(fmt.Sprintf("demand lane %d", i), stream, &c.demandBytes, &c.demandPages, &e.copies[i]))
	}
	if lone, ok := bulk.(interface{ Alone() }); ok { // see sweep
		lone.Alone()
	}
	s.bulk = newLane("bulk lane", bulk, &c.bulkBytes, &c.bulkPages, &e.copies[e.workers])
	for _, l := range s.demand {
		w, err := newWorker(s, l)
		if err != nil {
			return err
		}
		defer w.poller.close()
		s.workers = append(s.workers, w)
	}

	// What an earlier session had asked for will not come any more. Threads whose messages it had read look
	// again: their faults come first now.
	e.pages.putBack()
	if err := errors.Join(e.resume(), e.wakeAll()); err != nil {
		return err
	}
	s.start()
	select {
	case <-e.pages.full:
		e.counters.lastPage.Store(e.now())
	case <-s.ctx.Done():
	}
	return s.finish()
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
	go s.sweep()
	for _, w := range s.workers {
		s.asking.Go(func() {
			s.end(w.run()) // first: the end of the lane is the smaller news
			_ = w.lane.stream.CloseSend()
		})
	}
}

// end ends the session if err says so.
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
	if !l.state.CompareAndSwap(busy, waiting) {
		return false
	}
	err := l.stream.RecvMsg(&l.reply)
	if !l.state.CompareAndSwap(waiting, busy) {
		return false
	}
	if err != nil {
		s.end(l.lost(err))
		return false
	}
	s.e.at("reply", 0)
	if err := s.accept(l); err != nil {
		s.end(fmt.Errorf("%s: %w", l.name, err))
		return false
	}
	return true
}

// finish ends all goroutines and says how Run went.
func (s *session) finish() error {
	err := context.Cause(s.ctx) // before it is us who end it
	s.fail(nil)
	s.e.at("ending", 0)
	for _, w := range s.workers {
		w.poller.stop()
	}
	s.asking.Wait()
	select {
	case <-s.e.pages.full: // also when something failed meanwhile: nothing was needed of it
		err = s.e.complete()
	default:
	}
	grace := time.NewTimer(laneGrace)
	defer grace.Stop()
	over := false
	for _, l := range append(s.demand[:len(s.demand):len(s.demand)], s.bulk) {
		if !over {
			select {
			case <-l.ended:
			case <-grace.C:
				over = true
			}
		}
		if over && l.state.Swap(abandoned) != waiting {
			<-l.ended
		}
	}
	return err
}
