// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/pkg/pagewire"
	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

// resume calls Run again, with new lanes to a source of so many pages that works, waits until it ends, and compares all
// memory.
func (g *target) resume(pages uint64) {
	g.t.Helper()
	g.park = nil
	g.StartSweep()
	l := dial(g.t, realSource(g.t, layout{{kind: uffdtest.Shmem, pages: pages}}), g.workers)
	mustEnd(g.t, g.run(context.Background(), l))
	g.verify()
}

// TestLaneLost: a lane is cut while there are pages in every state. Run continues with new lanes.
func TestLaneLost(t *testing.T) {
	const pages = 600
	for _, cut := range []string{"demand", "bulk", "both"} {
		t.Run(cut, func(t *testing.T) {
			g, demand, bulk, run := start(t, pages, Options{})
			park := g.parkAt("install", 1)
			ending, parkInstall := make(chan struct{}), g.park
			g.park = func(at string, page uint64) {
				if at == "ending" {
					close(ending)
				}
				parkInstall(at, page)
			}
			g.StartSweep()
			result := run()
			bulk.send(t, pageSize, func() pagewire.Run { // makes pages present and zero
				bulk.asked(t)
				return pagesOf(0, 1)
			}(), zerosOf(3, 1))
			until(t, "two pages", func() bool { return g.Stats().PagesPresent == 2 })
			wait := []uffdtest.Pending{g.read(0, 5, 0), g.read(0, 1, 0), g.read(0, 590, 0)} // makes pages demanded
			for range wait {
				demand.asked(t)
			}
			expect(t, g.read(0, 3, 0), 0)         // this page was zero, then zeroing, and is present
			bulk.send(t, pageSize, pagesOf(1, 2)) // makes pages installing
			park.await()
			thread := g.read(0, 2, 0)
			if cut != "bulk" {
				demand.end <- status.Error(codes.Unavailable, "cut")
			}
			if cut != "demand" {
				bulk.end <- nil
			}
			if cut == "demand" { // page 1 is still being installed when the session ends
				await(t, "end of the session", ending)
			}
			park.unpark()
			if err := await(t, "end of Run", result); !errors.Is(err, ErrLaneLost) {
				t.Fatalf("Run: %v, want ErrLaneLost", err)
			} else if cut == "demand" && status.Code(err) != codes.Unavailable {
				t.Errorf("Run: %v, want the status of the lane", err)
			}
			select {
			case <-g.Done():
				t.Fatal("done")
			default:
			}
			for _, p := range []uint64{5, 590} {
				if s := g.pages.get(p); s == present || s == zero {
					t.Fatalf("page %d is in state %d", p, s)
				}
			}
			for _, w := range []uffdtest.Pending{wait[0], wait[2]} { // these have not continued without their pages
				w.WaitWaiting()
			}
			g.resume(pages)
			expect(t, wait[0], word(0, 5, 0))
			expect(t, wait[1], word(0, 1, 0))
			expect(t, wait[2], word(0, 590, 0))
			expect(t, thread, word(0, 2, 0))
		})
	}
}

// TestCancel: Run returns when its context ends, although the source is silent. The memory stays registered.
func TestCancel(t *testing.T) {
	g, demand, _, run := startSilent(t, 8, Options{})
	ctx, cancel := context.WithCancelCause(context.Background())
	result := run(ctx)
	thread := g.read(0, 5, 0)
	demand.asked(t)
	reason := errors.New("the operator said so")
	cancel(reason)
	if err := await(t, "end of Run", result); !errors.Is(err, reason) {
		t.Fatalf("Run: %v, want %v", err, reason)
	}
	if thread.WaitWaiting(); thread.Ended() {
		t.Fatal("the thread went on without its page")
	}
	g.resume(8)
	expect(t, thread, word(0, 5, 0))
}

// TestSilentSourceAtTheEnd: Run returns nil although the source does not end its lanes.
func TestSilentSourceAtTheEnd(t *testing.T) {
	g, _, bulk, run := startSilent(t, 8, Options{})
	g.StartSweep()
	result := run(context.Background())
	bulk.asked(t)
	bulk.sendPages(t, 0, 8)
	mustEnd(t, result)
	g.verify()
}

// startSilent is start with a source that never ends its lanes.
func startSilent(
	t *testing.T, pages uint64, o Options,
) (g *target, demand, bulk *scriptedLane, run func(context.Context) <-chan error) {
	t.Helper()
	o.Workers = 1
	g = newTarget(t, layout{{kind: uffdtest.Shmem, pages: pages}}, o)
	over := make(chan struct{})
	s := &script{lanes: make(chan *scriptedLane, 2), silent: over}
	l := dial(t, serve(t, s.serve), 1)
	t.Cleanup(func() { close(over) })
	demand, bulk = await(t, "lane", s.lanes), await(t, "lane", s.lanes)
	return g, demand, bulk, func(ctx context.Context) <-chan error { return g.run(ctx, l) }
}

func TestProcessGone(t *testing.T) {
	g, demand, _, run := start(t, 8, Options{})
	result := run()
	g.read(0, 5, 0)
	demand.asked(t)
	g.child.Kill()
	demand.send(t, pageSize, pagesOf(5, 1))
	if err := await(t, "end of Run", result); !errors.Is(err, ErrProcessGone) {
		t.Fatalf("Run: %v, want ErrProcessGone", err)
	}
}

// TestRangeGone: if somebody unregisters the memory, of which no event tells, Run returns an error after a while.
func TestRangeGone(t *testing.T) {
	g, demand, _, run := start(t, 8, Options{})
	result := run()
	thread := g.read(0, 5, 0)
	demand.asked(t)
	if err := g.uffd.Unregister(g.blocks[0].all()); err != nil {
		t.Fatal(err)
	}
	expect(t, thread, 0)
	demand.send(t, pageSize, pagesOf(5, 1))
	if err := await(t, "end of Run", result); !errors.Is(err, ErrRangeGone) {
		t.Fatalf("Run: %v, want ErrRangeGone", err)
	}
}

// TestFirstErrorCounts: when a page that could not be put in is missing again, the session has ended for that reason. A
// second answer for the page, which nobody has asked for by then, does not change it.
func TestFirstErrorCounts(t *testing.T) {
	g, w, l := newIdle(t, uffdtest.Shmem, 8)
	if err := g.uffd.Unregister(g.blocks[0].all()); err != nil {
		t.Fatal(err)
	}
	page := make([]byte, pageSize)
	g.pages.claimFault(5)
	g.pages.arrive(5)
	if err := w.s.install(l.record, &g.blocks[0], 5, 1, page); !errors.Is(err, ErrRangeGone) {
		t.Fatalf("install: %v, want ErrRangeGone", err)
	}
	if s := g.pages.get(5); s != missing {
		t.Fatalf("the page is in state %d", s)
	}
	w.s.end(w.s.acceptData(l.record, &g.blocks[0], 5, 1, page))
	if err := context.Cause(w.s.ctx); !errors.Is(err, ErrRangeGone) {
		t.Errorf("the session ended with %v, want ErrRangeGone", err)
	}
}

func TestFork(t *testing.T) {
	g, _, _, run := start(t, 8, Options{})
	result := run()
	forker := g.child.Go(uffdtest.Fork(0))
	err := await(t, "end of Run", result)
	var fork *ForkError
	if !errors.As(err, &fork) {
		t.Fatalf("Run: %v, want a *ForkError", err)
	}
	forker.JoinOK()
	if err := fork.Child.Close(); err != nil {
		t.Error(err)
	}
	g.resume(8)
}

func TestMove(t *testing.T) {
	g, _, _, run := start(t, 8, Options{})
	result := run()
	elsewhere := g.child.Map(uffdtest.Anon, 8)
	mover := g.child.Go(uffdtest.Move(g.blocks[0].all(), elsewhere.Start))
	if err := await(t, "end of Run", result); !errors.Is(err, ErrMoved) {
		t.Fatalf("Run: %v, want ErrMoved", err)
	}
	uffdtest.EventsUntil(t, g.uffd, mover) // the thread continues with munmap(2), whose event must be read after Run
	mover.Join()
}

// TestExplain: errors of the kernel become those of this package. Limits of a tmpfs or a cgroup cannot be set
// everywhere where tests run, so the errors are made by hand.
func TestExplain(t *testing.T) {
	b := &block{Block: Block{ID: "ram"}}
	for said, want := range map[error]error{
		uffd.ErrProcessGone: ErrProcessGone, uffd.ErrNoMemory: ErrNoMemory, uffd.ErrNoSpace: ErrNoMemory,
		uffd.ErrNotRegistered: ErrRangeGone, uffd.ErrFault: uffd.ErrFault,
	} {
		err := explain(b, 0x5000, fmt.Errorf("UFFDIO_COPY: %w", said))
		if !errors.Is(err, want) || !errors.Is(err, said) {
			t.Errorf("%v became %v, want %v", said, err, want)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	u := uffdtest.Start(t).NewUFFD(uffd.OpenSyscall)
	sound := Block{ID: "ram", Addr: 0x10000, Size: 0x4000, PageSize: 0x1000, UFFD: u}
	for name, spoil := range map[string]func(*Block){
		"page size 0":       func(b *Block) { b.PageSize = 0 },
		"page size 5000":    func(b *Block) { b.PageSize = 5000 },
		"page size 1 GiB":   func(b *Block) { b.PageSize = 1 << 30 },
		"half a page":       func(b *Block) { b.Size = 0x1800 },
		"nothing":           func(b *Block) { b.Size = 0 },
		"misaligned":        func(b *Block) { b.Addr = 0x10800 },
		"no descriptor":     func(b *Block) { b.UFFD = nil },
		"memory not mapped": func(*Block) {},
	} {
		b := sound
		spoil(&b)
		if _, err := New(Options{Blocks: []Block{b}}); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if _, err := New(Options{}); err == nil {
		t.Error("no block: accepted")
	}
}

// TestRunMisuse: Run refuses a wrong number of lanes, and a second call at a time.
func TestRunMisuse(t *testing.T) {
	g, _, bulk, run := start(t, 8, Options{})
	if err := g.Run(context.Background(), nil, nil, nil); err == nil {
		t.Error("ran without lanes")
	}
	g.StartSweep()
	result := run()
	bulk.asked(t)
	if err := g.Run(context.Background(), nil, nil, nil); !errors.Is(err, ErrRunning) {
		t.Errorf("a second Run: %v, want ErrRunning", err)
	}
	bulk.sendPages(t, 0, 8)
	mustEnd(t, result)
}

// stuck is a lane whose Send waits until Abort.
type stuck struct {
	Lane
	sends, aborted chan struct{}
	once           sync.Once
}

func (l *stuck) Send(*pagewire.Request) error {
	close(l.sends)
	<-l.aborted
	return io.EOF
}

func (l *stuck) CloseSend() error { return nil }

func (l *stuck) Abort() {
	l.once.Do(func() { close(l.aborted) })
	l.Lane.Abort()
}

// TestSenderIsReleased: a worker in Send does not delay the end of the session.
func TestSenderIsReleased(t *testing.T) {
	const pages = 64
	g := newTarget(t, layout{{kind: uffdtest.Shmem, pages: pages}}, Options{Workers: 1})
	l, theirs := scripted(t, 1)
	lane := &stuck{Lane: l.demand[0], sends: make(chan struct{}), aborted: make(chan struct{})}
	l.demand[0] = lane
	g.StartSweep()
	result := g.run(context.Background(), l)
	thread := g.read(0, 5, 0)
	await(t, "request", lane.sends)
	theirs[1].end <- status.Error(codes.Unavailable, "cut")
	if err := await(t, "end of Run", result); !errors.Is(err, ErrLaneLost) {
		t.Fatalf("Run: %v, want ErrLaneLost", err)
	}
	g.resume(pages)
	expect(t, thread, word(0, 5, 0))
}

// TestForks: if a process forks twice before the first event is handled, the error has both children. A child whose
// descriptor were lost would wait for ever. Other errors are reported beside them.
func TestForks(t *testing.T) {
	first, second := uffd.FromFD(-1), uffd.FromFD(-1)
	err := joined(joined(joined(nil, ErrForeignFault), &ForkError{Child: first}), &ForkError{Child: second})
	var fork *ForkError
	if !errors.As(err, &fork) || fork.Child != first || len(fork.More) != 1 || fork.More[0] != second ||
		!errors.Is(err, ErrForeignFault) {
		t.Errorf("%v: %+v", err, fork)
	}
}
