// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/internal/pagewire"
	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

// resume runs again over new lanes to a sound source of that many pages, until the end, and compares all memory.
func (g *target) resume(pages uint64) {
	g.t.Helper()
	g.park = nil
	g.StartSweep()
	l := dial(g.t, realSource(g.t, layout{{kind: uffdtest.Shmem, pages: pages}}), g.workers)
	mustEnd(g.t, g.run(context.Background(), l))
	g.verify()
}

// TestLaneLost cuts a lane while pages are in every state, and goes on over new lanes.
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
			bulk.send(t, pageSize, func() pagewire.Run { // present and zero
				bulk.asked(t)
				return pagesOf(0, 1)
			}(), zerosOf(3, 1))
			until(t, "two pages", func() bool { return g.Stats().PagesPresent == 2 })
			wait := []uffdtest.Pending{g.read(0, 5, 0), g.read(0, 1, 0), g.read(0, 590, 0)} // demanded
			for range wait {
				demand.asked(t)
			}
			expect(t, g.read(0, 3, 0), 0)         // zero, then zeroing, then present
			bulk.send(t, pageSize, pagesOf(1, 2)) // installing
			park.await()
			thread := g.read(0, 2, 0)
			if cut != "bulk" {
				demand.end <- status.Error(codes.Unavailable, "cut")
			}
			if cut != "demand" {
				bulk.end <- nil
			}
			if cut == "demand" { // page 1 is still installing when the session ends
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
			for _, w := range []uffdtest.Pending{wait[0], wait[2]} {
				if !w.Waiting() {
					t.Error("a thread went on without its page")
				}
			}
			g.resume(pages)
			expect(t, wait[0], word(0, 5, 0))
			expect(t, wait[1], word(0, 1, 0))
			expect(t, wait[2], word(0, 590, 0))
			expect(t, thread, word(0, 2, 0))
		})
	}
}

// TestHostileSource: whatever a source sends, nothing is installed that was not asked for, Run says why it ended, and
// the memory is as it was.
func TestHostileSource(t *testing.T) {
	const pages = 32
	for name, reply := range map[string]pagewire.Reply{
		"unasked page":      {Runs: []pagewire.Run{pagesOf(9, 1)}},
		"unasked zeros":     {Runs: []pagewire.Run{zerosOf(9, 1)}},
		"after asked page":  {Runs: []pagewire.Run{pagesOf(5, 2)}},
		"asked page twice":  {Runs: []pagewire.Run{pagesOf(5, 1), pagesOf(5, 1)}},
		"zeros twice":       {Runs: []pagewire.Run{zerosOf(5, 1), zerosOf(5, 1)}},
		"another block":     {Runs: []pagewire.Run{{Block: 1, Offset: 5 * pageSize, Length: pageSize}}},
		"beyond the end":    {Runs: []pagewire.Run{pagesOf(pages, 1)}},
		"across the end":    {Runs: []pagewire.Run{zerosOf(pages-1, 2)}},
		"far beyond":        {Runs: []pagewire.Run{{Offset: 1<<64 - 2*pageSize, Length: pageSize}}},
		"misaligned":        {Runs: []pagewire.Run{{Offset: 5*pageSize + 512, Length: pageSize}}},
		"half a page":       {Runs: []pagewire.Run{{Offset: 5 * pageSize, Length: pageSize / 2}}},
		"huge run of zeros": {Runs: []pagewire.Run{{Length: 1<<32 - pageSize, Zero: true}}},
	} {
		t.Run(name, func(t *testing.T) {
			g, demand, _, run := start(t, pages, Options{})
			result := run()
			thread := g.read(0, 5, 0)
			demand.asked(t)
			for _, r := range reply.Runs {
				if !r.Zero {
					reply.Data = append(reply.Data, make([]byte, r.Length)...)
				}
			}
			// What is asked for may be installed before the error is found: give the right bytes.
			if r := reply.Runs[0]; r == pagesOf(5, 1) || r == pagesOf(5, 2) {
				fill(reply.Data[:pageSize], 0, 5)
			}
			if err := demand.stream.SendMsg(&reply); err != nil {
				t.Fatal(err)
			}
			if err := await(t, "end of Run", result); !errors.Is(err, ErrProtocol) {
				t.Fatalf("Run: %v, want ErrProtocol", err)
			}
			if name == "zeros twice" {
				expect(t, thread, 0) // the source may say so of a page that was asked for
				return
			}
			g.resume(pages)
			expect(t, thread, word(0, 5, 0))
		})
	}
}

// TestSweepCheated: the source answers all the bytes that the sweep asked for, but not all pages.
func TestSweepCheated(t *testing.T) {
	g, _, bulk, run := start(t, 8, Options{})
	g.StartSweep()
	result := run()
	bulk.asked(t)
	bulk.send(t, pageSize, pagesOf(0, 2))
	bulk.send(t, pageSize, pagesOf(0, 2), pagesOf(4, 4))
	if err := await(t, "end of Run", result); !errors.Is(err, ErrProtocol) {
		t.Fatalf("Run: %v, want ErrProtocol", err)
	}
	if s := g.Stats(); s.PagesPresent != 6 {
		t.Errorf("%d pages present, want 6", s.PagesPresent)
	}
}

// TestMalformedReply: bytes that are no message at all are the source's fault too, not the network's.
func TestMalformedReply(t *testing.T) {
	g, demand, _, run := start(t, 8, Options{})
	result := run()
	thread := g.read(0, 5, 0)
	demand.asked(t)
	// A run without a byte.
	if err := demand.stream.SendMsg(&pagewire.Reply{Runs: []pagewire.Run{{Offset: 5 * pageSize, Zero: true}}}); err != nil {
		t.Fatal(err)
	}
	if err := await(t, "end of Run", result); !errors.Is(err, ErrProtocol) {
		t.Fatalf("Run: %v, want ErrProtocol", err)
	}
	g.resume(8)
	expect(t, thread, word(0, 5, 0))
}

// TestCancel: Run ends with its context, all stays registered, and a silent source cannot keep it.
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

// TestAdopt: another engine goes on with a descriptor whose messages were read by the first one, as a daemon does that
// was started again.
func TestAdopt(t *testing.T) {
	g, demand, _, run := startSilent(t, 8, Options{})
	ctx, cancel := context.WithCancel(context.Background())
	result := run(ctx)
	thread := g.read(0, 5, 0)
	demand.asked(t)
	cancel()
	if err := await(t, "end of Run", result); !errors.Is(err, context.Canceled) {
		t.Fatalf("Run: %v, want that it was cancelled", err)
	}
	second, err := New(Options{Blocks: []Block{g.blocks[0].Block}, Workers: 1})
	if err != nil {
		t.Fatal(err)
	}
	g.Engine = second
	again := g.run(context.Background(), dial(t, realSource(t, layout{{kind: uffdtest.Shmem, pages: 8}}), 1))
	expect(t, thread, word(0, 5, 0)) // without the sweep: its fault was read again
	g.StartSweep()
	mustEnd(t, again)
	g.verify()
}

// TestTakeUp: with the page states of the first engine, the second asks for nothing that is there already, the pages
// that were known to be zero included.
func TestTakeUp(t *testing.T) {
	state := stateMemory([]uint64{8})
	g, demand, bulk, run := startSilent(t, 8, Options{State: state})
	ctx, cancel := context.WithCancel(context.Background())
	g.StartSweep()
	result := run(ctx)
	bulk.asked(t)
	bulk.sendPages(t, 0, 4) // page 3 is zero
	thread := g.read(0, 5, 0)
	demand.asked(t)
	until(t, "present", func() bool { return g.Stats().PagesPresent == 4 })
	cancel()
	if err := await(t, "end of Run", result); !errors.Is(err, context.Canceled) {
		t.Fatalf("Run: %v, want that it was cancelled", err)
	}
	second, err := New(Options{Blocks: []Block{g.blocks[0].Block}, Workers: 1, State: state})
	if err != nil {
		t.Fatal(err)
	}
	if s := second.Stats(); s.PagesPresent != 4 || s.PagesZero != 1 {
		t.Errorf("taken up: %+v", s)
	}
	g.Engine = second
	again := g.run(context.Background(), dial(t, realSource(t, layout{{kind: uffdtest.Shmem, pages: 8}}), 1))
	expect(t, thread, word(0, 5, 0))
	g.StartSweep()
	mustEnd(t, again)
	if s := second.Stats(); s.PageBytes != 4*pageSize || s.PagesPresent != 8 {
		t.Errorf("at the end: %+v", s)
	}
	g.verify()
}

// TestSilentSourceAtTheEnd: a source that does not end its lanes cannot keep Run from ending well.
func TestSilentSourceAtTheEnd(t *testing.T) {
	g, _, bulk, run := startSilent(t, 8, Options{})
	g.StartSweep()
	result := run(context.Background())
	bulk.asked(t)
	bulk.sendPages(t, 0, 8)
	mustEnd(t, result)
	g.verify()
}

// startSilent is start with a source that leaves its lanes open for ever.
func startSilent(t *testing.T, pages uint64, o Options) (g *target, demand, bulk *scriptedLane, run func(context.Context) <-chan error) {
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

// TestRangeGone: without an event (somebody unregistered the range) it is an error, after a while.
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
	uffdtest.EventsUntil(t, g.uffd, mover) // it goes on with unmapping, an event that nobody reads after Run
	mover.Join()
}

// TestExplain: what the kernel says about a page, and what it means to a caller. (Memory limits of a
// tmpfs or a cgroup cannot be had in every place where tests run.)
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

// TestRunMisuse: the wrong number of lanes, and a second Run at a time.
func TestRunMisuse(t *testing.T) {
	g, _, bulk, run := start(t, 8, Options{})
	if err := g.Run(context.Background(), nil, nil); err == nil {
		t.Error("ran without lanes")
	}
	g.StartSweep()
	result := run()
	bulk.asked(t)
	if err := g.Run(context.Background(), nil, nil); !errors.Is(err, ErrRunning) {
		t.Errorf("a second Run: %v, want ErrRunning", err)
	}
	bulk.sendPages(t, 0, 8)
	mustEnd(t, result)
}
