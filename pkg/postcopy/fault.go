// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"errors"
	"fmt"
	"io"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/internal/schedule"
	"github.com/migrated-vm/migrated/pkg/pagewire"
	"github.com/migrated-vm/migrated/pkg/uffd"
)

// worker reads messages, claims pages and asks for them: steps 1 and 2. Its goroutine owns all of it.
type worker struct {
	s       *session
	lane    *lane
	poller  *poller
	events  *uffd.EventBuffer
	request pagewire.Request
	bytes   uint64       // asked for by request
	guesses []prediction // of this batch
}

// prediction is what a thread is expected to fault on next, in a block.
type prediction struct {
	block  *block
	thread uint32
	guess  guess
}

func newWorker(s *session, l *lane) (*worker, error) {
	p, err := newPoller(s.e.uffds)
	if err != nil {
		return nil, err
	}
	return &worker{
		s: s, lane: l, poller: p, events: uffd.NewEventBuffer(eventBatch),
		request: pagewire.Request{Ranges: make([]pagewire.Range, 0, pagewire.MaxRanges)},
		guesses: make([]prediction, 0, eventBatch),
	}, nil
}

// run works until the poller is stopped or the worker cannot go on. A batch that was read is always dealt with.
func (w *worker) run() error {
	for {
		ready, err := w.poller.wait()
		if len(ready) == 0 || err != nil {
			return err
		}
		for _, r := range ready {
			u := w.s.e.uffds[r.Fd]
			if r.Events&unix.EPOLLIN == 0 {
				return fmt.Errorf("userfaultfd %d: epoll says %#x: it is blocking", u.FD(), r.Events)
			}
			if err := w.batch(u); err != nil {
				return err
			}
		}
	}
}

// poller waits for messages of several userfaultfds. Its worker sleeps in epoll_wait(2) itself: Go's poller would wake
// more threads than there is work for (docs/fault-budget.md). EPOLLEXCLUSIVE makes a message wake one worker.
type poller struct {
	epoll, wake int
	sleeper     schedule.Sleeper
	ready       [pollBatch]unix.EpollEvent
}

// wakeIndex is the epoll data of the eventfd that stops the poller, in place of the index of a userfaultfd.
const wakeIndex = -1

func newPoller(uffds []*uffd.UFFD) (_ *poller, err error) {
	p := &poller{epoll: -1, wake: -1}
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	if p.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, fmt.Errorf("epoll_create1: %w", err)
	}
	if p.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	err = unix.EpollCtl(p.epoll, unix.EPOLL_CTL_ADD, p.wake, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: wakeIndex})
	for i, u := range uffds {
		if err == nil {
			err = unix.EpollCtl(p.epoll, unix.EPOLL_CTL_ADD, u.FD(), &unix.EpollEvent{
				Events: unix.EPOLLIN | unix.EPOLLEXCLUSIVE, Fd: int32(i),
			})
		}
	}
	if err != nil {
		return nil, fmt.Errorf("epoll_ctl: %w", err)
	}
	return p, nil
}

// wait returns the descriptors that have messages: Fd is the index, Events what they have. None after stop.
func (p *poller) wait() ([]unix.EpollEvent, error) {
	for {
		n, err := unix.EpollWait(p.epoll, p.ready[:], -1)
		p.sleeper.Woke()
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("epoll_wait: %w", err)
		}
		for _, r := range p.ready[:n] {
			if r.Fd == wakeIndex {
				return nil, nil
			}
		}
		return p.ready[:n], nil
	}
}

// stop makes this and every later wait return nothing.
func (p *poller) stop() { _, _ = unix.Write(p.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0}) }

// close closes the descriptors. Nobody may be waiting.
func (p *poller) close() {
	for _, fd := range []int{p.epoll, p.wake} {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}

// batch is step 1: it does one read(2), and deals with all of its messages.
func (w *worker) batch(u *uffd.UFFD) error {
	e := w.s.e
	n, err := u.Read(w.events)
	e.at("read", 0)
	for i := range n { // before any fault, and soon: see discard.go
		if ev := w.events.At(i); ev.Kind == uffd.EventRemap {
			w.s.end(moved(ev)) // first: discarding the old range may complete the page table
		} else if ev.Kind == uffd.EventRemove {
			e.discard(u, ev.Remove.Start, ev.Remove.End)
		} else if ev.Kind == uffd.EventUnmap {
			e.discard(u, ev.Unmap.Start, ev.Unmap.End)
		}
	}
	if errors.Is(err, uffd.ErrWouldBlock) { // another worker was faster
		return nil
	}
	if err != nil {
		return err
	}
	now := e.now()
	for i := range n {
		err = joined(err, w.handle(u, w.events.At(i), now)) // the rest of the batch must not be forgotten
	}
	if err := errors.Join(err, w.send()); err != nil {
		return err
	}
	return w.follow()
}

// joined returns both errors as one.
func joined(err, next error) error {
	switch {
	case next == nil:
		return err
	case err == nil:
		return next
	}
	return bothOf(err, next)
}

// bothOf joins two errors. Two ForkErrors become one with the children of both.
func bothOf(err, next error) error {
	var first, fork *ForkError // allocated: not in the way of a fault
	if errors.As(next, &fork) && errors.As(err, &first) {
		first.More = append(first.More, fork.Child)
		return err
	}
	return errors.Join(err, next)
}

// handle deals with one message.
func (w *worker) handle(u *uffd.UFFD, ev uffd.Event, now int64) error {
	switch ev.Kind {
	case uffd.EventPagefault:
		return w.fault(u, &ev, now)
	case uffd.EventRemove:
		return w.s.e.wake(u, ev.Remove.Start, ev.Remove.End)
	case uffd.EventUnmap:
		return nil // the kernel woke the threads that waited there: they get SIGSEGV
	case uffd.EventFork:
		return &ForkError{Child: uffd.FromFD(ev.Fork.FD)}
	case uffd.EventRemap:
		return moved(ev)
	}
	return fmt.Errorf("message of unknown kind %v from the userfaultfd", ev.Kind)
}

func moved(ev uffd.Event) error {
	return fmt.Errorf("%w: %d bytes from %#x to %#x", ErrMoved, ev.Remap.Len, ev.Remap.From, ev.Remap.To)
}

// fault is step 2: it claims the page and, if this worker has to ask for it, puts it into the request.
func (w *worker) fault(u *uffd.UFFD, ev *uffd.Event, now int64) error {
	e, addr, thread := w.s.e, ev.Pagefault.Addr, ev.Pagefault.ThreadID
	b := e.find(u, addr)
	if b == nil {
		return fmt.Errorf("%w: address %#x", ErrForeignFault, addr)
	}
	p := b.first + (addr-b.Addr)>>b.shift
	if b.gigantic != nil {
		return w.faultGigantic(b, p, now)
	}
	claim := e.pages.claimFault(p)
	e.counters.faults[claim].Add(1)
	switch claim {
	case claimNothing:
		return nil
	case claimZero:
		e.at("zero", p)
		err := e.zero(b, p)
		e.pending.end(p) // it was timed by a session that could not install it
		e.latency.add(time.Duration(e.now() - now))
		return err
	case claimLost: // its message was read late, or it was discarded without an event: then it is lost again
		if _, err := b.UFFD.Poison(b.page(p), 0); err != nil &&
			!errors.Is(err, uffd.ErrExist) && !errors.Is(err, uffd.ErrAgain) {
			return explain(b, b.addr(p), err)
		}
		return b.UFFD.Wake(b.page(p))
	case claimPresent:
		e.pending.end(p) // likewise
		if ev.Pagefault.Flags&uffd.FaultMinor != 0 {
			return e.remap(b, p)
		}
		return e.refill(b, p)
	}
	b.heat.add(p - b.first)
	e.at("claimed", p)
	e.pending.start(p, now, claim == claimRequest)
	if !e.pages.isWaitedFor(p) { // the page has come meanwhile, and nobody else will end the time of this fault
		e.pending.end(p)
	}
	if claim != claimWait {
		if err := w.ask(b, p); err != nil {
			return err
		}
	}
	if !e.started.Load() {
		if claim == claimWait { // one of those that were asked for ahead
			return nil
		}
		return w.askAhead(b, p)
	}
	most := int64(predictBytes >> b.shift)
	if e.budget.wait(now) > 0 {
		most = 0
	}
	if g := e.predictor.fault(thread, p, most); g.count > 0 {
		w.guesses = append(w.guesses, prediction{b, thread, g})
	} else if g.step == 0 || most == 0 {
		e.hints.faulted(thread, p)
	}
	return nil
}

// askAhead adds the missing pages behind page p. It is for the load of the device state, when the sweep does not run
// yet.
func (w *worker) askAhead(b *block, p uint64) error {
	for q := p + 1; q < min(p+w.s.e.ahead>>b.shift, b.end()); q++ {
		if !w.s.e.pages.claimAhead(q) {
			return nil // it is here, or another worker asks for it
		}
		if err := w.ask(b, q); err != nil {
			return err
		}
	}
	return nil
}

// follow asks for the pages that the threads of this batch are predicted to want next. It uses a message of its own, so
// that they do not delay the pages that threads wait for.
func (w *worker) follow() error {
	for i := range w.guesses {
		h := &w.guesses[i]
		q, asked := h.guess.first, int64(0)
		for range h.guess.count {
			if q < h.block.first || q >= h.block.end() {
				break
			}
			if w.s.e.pages.claimAhead(q) {
				asked++
				if err := w.ask(h.block, q); err != nil {
					return err
				}
			}
			q += uint64(h.guess.step)
		}
		w.s.e.guessed(h.block, asked)
		if h.guess.step > 0 {
			w.s.e.hints.set(h.thread, q) // the sweep goes on behind them
		}
	}
	w.guesses = w.guesses[:0]
	return w.send()
}

// guessed counts pages that were asked for ahead. Their cost is taken from the budget now, because an answer on a
// demand lane does not say whether a thread waits for it.
func (e *Engine) guessed(b *block, pages int64) {
	e.counters.guessed.Add(uint64(pages))
	e.budget.spend(int64(e.budget.weighs()*float64(pages<<b.shift)), e.now())
}

// ask adds a page to the request, which is sent before it exceeds what a message may ask for.
func (w *worker) ask(b *block, p uint64) error {
	if len(w.request.Ranges) == pagewire.MaxRanges || w.bytes+b.unit() > pagewire.MaxRequestedBytes {
		if err := w.send(); err != nil {
			return err
		}
	}
	w.bytes += b.unit()
	offset := (p - b.first) << b.shift
	if n := len(w.request.Ranges); n > 0 {
		if last := &w.request.Ranges[n-1]; last.Block == uint32(b.index) && last.Offset+uint64(last.Length) == offset {
			last.Length += uint32(b.unit())
			return nil
		}
	}
	w.request.Ranges = append(w.request.Ranges,
		pagewire.Range{Block: uint32(b.index), Offset: offset, Length: uint32(b.unit())})
	return nil
}

// send sends the request on the worker's lane.
func (w *worker) send() error {
	if w.bytes == 0 {
		return nil
	}
	err := w.lane.ask(&w.request, w.bytes)
	w.request.Ranges, w.bytes = w.request.Ranges[:0], 0
	return err
}

// ask sends a request for so many bytes. Pages of a request that fails are asked for by the next Run.
func (l *lane) ask(r *pagewire.Request, bytes uint64) error {
	l.asked.Add(int64(bytes)) // first: the answer may be faster than Send
	err := l.stream.Send(r)
	if err == nil || errors.Is(err, io.EOF) { // EOF: the lane is over, and its receiver learns why
		return nil
	}
	return l.lost(err)
}

// covered calls f for each block of u with the whole pages of it that lie in [start, end). Addresses outside of the
// blocks are passed over.
func (e *Engine) covered(u *uffd.UFFD, start, end uint64, f func(b *block, p, n uint64)) {
	for i := range e.blocks {
		b := &e.blocks[i]
		if b.UFFD != u || start >= b.Addr+b.Size || end <= b.Addr {
			continue
		}
		from := (max(start, b.Addr) - b.Addr + b.unit() - 1) >> b.shift
		to := (min(end, b.Addr+b.Size) - b.Addr) >> b.shift
		if from < to {
			f(b, b.first+from, to-from)
		}
	}
}

// discard marks the pages that the process gave up.
func (e *Engine) discard(u *uffd.UFFD, start, end uint64) {
	e.covered(u, start, end, func(b *block, p, n uint64) {
		e.pages.discard(p, n)
		e.pending.endAll(p, n)
		e.counters.discarded.Add(n << b.shift)
	})
}

// wake lets the threads that wait for a page in the range look again, because their page will not come any more.
func (e *Engine) wake(u *uffd.UFFD, start, end uint64) (err error) {
	e.covered(u, start, end, func(b *block, p, n uint64) {
		if wakeErr := b.wake(p, n); err == nil {
			err = wakeErr
		}
	})
	return err
}
