// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/migrated-vm/migrated/pkg/pagewire"
	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

// nullLane discards requests, because the cost of gRPC is not what is measured here.
type nullLane struct{ Lane }

func (nullLane) Send(*pagewire.Request) error { return nil }
func (nullLane) CloseSend() error             { return nil }

// newIdle returns a session without goroutines, and a worker and a lane of it that a test drives itself.
func newIdle(t testing.TB, kind uffdtest.Kind, pages uint64) (*target, *worker, *lane) {
	t.Helper()
	g := newTarget(t, layout{{kind: kind, pages: pages}}, Options{Workers: 1})
	s := &session{e: g.Engine}
	s.ctx, s.fail = context.WithCancelCause(context.Background())
	t.Cleanup(func() { s.fail(nil) })
	l := newLane("lane", nullLane{}, &g.counters.demandBytes, &g.counters.demandPages, &g.copies[0])
	s.demand = []*lane{l}
	w, err := newWorker(s, l)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.poller.close)
	return g, w, l
}

// await handles the message of a thread that waits.
func (w *worker) await(t testing.TB, u *uffd.UFFD) {
	t.Helper()
	if ready, err := w.poller.wait(); len(ready) != 1 || err != nil {
		t.Fatalf("no message: %v, %v", ready, err)
	}
	if err := w.batch(u); err != nil {
		t.Fatal(err)
	}
}

// TestNoAllocations: the engine allocates nothing to handle an event, claim a page, request it, and install it.
func TestNoAllocations(t *testing.T) {
	const pages = 512
	g, w, l := newIdle(t, uffdtest.Shmem, pages)
	page := make([]byte, pageSize)
	next := uint64(0)
	check := func(what string, f func()) {
		t.Helper()
		if n := testing.AllocsPerRun(100, f); n != 0 {
			t.Errorf("%s: %v allocations", what, n)
		}
	}
	ev := uffd.Event{Kind: uffd.EventPagefault}
	b := &g.blocks[0]
	check("fault, request, reply with a page", func() {
		next++
		ev.Pagefault.Addr = b.addr(next)
		if err := w.handle(g.uffd, ev, g.now()); err != nil {
			t.Fatal(err)
		}
		if err := w.send(); err != nil {
			t.Fatal(err)
		}
		l.reply.Runs, l.reply.Data = append(l.reply.Runs[:0], pagesOf(next, 1)), page
		if err := w.s.accept(l); err != nil {
			t.Fatal(err)
		}
	})
	check("fault, request, reply with a zero page", func() {
		next++
		ev.Pagefault.Addr = b.addr(next)
		if err := w.handle(g.uffd, ev, g.now()); err != nil {
			t.Fatal(err)
		}
		if err := w.send(); err != nil {
			t.Fatal(err)
		}
		l.reply.Runs, l.reply.Data = append(l.reply.Runs[:0], zerosOf(next, 1)), nil
		if err := w.s.accept(l); err != nil {
			t.Fatal(err)
		}
	})
	check("fault on a page that is there", func() {
		if err := w.handle(g.uffd, ev, g.now()); err != nil {
			t.Fatal(err)
		}
	})
	check("batch without a message", func() {
		if err := w.batch(g.uffd); err != nil {
			t.Fatal(err)
		}
	})
	if s := g.Stats(); s.PagesPresent != 202 || s.PagesZero != 101 || s.FaultP50 == 0 {
		t.Errorf("not what was to be measured: %+v", s)
	}
	// Now a whole fault, with messages of the kernel.
	thread := g.child.Go(uffdtest.Touch(uffd.Range{Start: b.addr(300), Len: 150 * pageSize}, uffdtest.Shmem))
	next = 300
	check("message, request, reply", func() {
		w.await(t, g.uffd)
		l.reply.Runs, l.reply.Data = append(l.reply.Runs[:0], pagesOf(next, 1)), page
		if err := w.s.accept(l); err != nil {
			t.Fatal(err)
		}
		next++
	})
	g.child.Kill()
	_ = thread
}

// BenchmarkClaim measures the page table's part of a fault: claim, arrive, finish.
func BenchmarkClaim(b *testing.B) {
	table := mustPages(b, 1<<20)
	table.left.Store(1 << 62)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		p := uint64(i) % (1 << 20)
		table.claimFault(p)
		table.arrive(p)
		table.giveUp(p, 1)
	}
}

// BenchmarkInstall4K installs the page of a decoded reply in a process that does not run.
func BenchmarkInstall4K(b *testing.B) { benchmarkInstall(b, 1) }

// BenchmarkInstall512K installs a run of the sweep.
func BenchmarkInstall512K(b *testing.B) { benchmarkInstall(b, 128) }

func benchmarkInstall(b *testing.B, n uint64) {
	const pages = 1 << 16
	g, w, l := newIdle(b, uffdtest.Shmem, pages)
	g.pages.left.Store(1 << 62)
	data := make([]byte, n*pageSize)
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	p := uint64(0)
	for b.Loop() {
		if p+n > pages {
			b.StopTimer()
			g.forget()
			p = 0
			b.StartTimer()
		}
		g.pages.claimSweep(p, n)
		l.asked.Store(int64(len(data)))
		l.reply.Runs, l.reply.Data = append(l.reply.Runs[:0], pagesOf(p, n)), data
		if err := w.s.accept(l); err != nil {
			b.Fatal(err)
		}
		p += n
	}
}

// forget makes all memory of block 0 missing again.
func (g *target) forget() {
	punch := g.child.Go(uffdtest.Punch(g.blocks[0].all()))
	uffdtest.EventsUntil(g.t, g.uffd, punch)
	punch.JoinOK()
	for i := range g.pages.words {
		g.pages.words[i].Store(0)
	}
}

// BenchmarkFaultLoopback measures how long a thread waits for a page over a lane on the loopback, one fault after
// another.
func BenchmarkFaultLoopback(b *testing.B) {
	const pages = 1 << 15
	l := layout{{kind: uffdtest.Shmem, pages: pages + 1}}
	g := newTarget(b, l, Options{})
	ctx, cancel := context.WithCancel(context.Background())
	result := g.run(ctx, dial(b, realSource(b, l), defaultWorkers))
	b.SetBytes(pageSize)
	b.ReportAllocs()
	b.ResetTimer()
	done := 0
	for done < b.N {
		n := min(b.N-done, pages)
		g.child.Go(uffdtest.Touch(uffd.Range{Start: g.blocks[0].Addr, Len: uint64(n) * pageSize}, uffdtest.Shmem)).JoinOK()
		if done += n; done < b.N {
			b.Fatalf("not more than %d pages: use -benchtime=%dx", pages, pages)
		}
	}
	b.StopTimer()
	s := g.Stats()
	b.ReportMetric(float64(s.FaultP50.Nanoseconds()), "ns/p50")
	b.ReportMetric(float64(s.FaultP99.Nanoseconds()), "ns/p99")
	cancel()
	if err := await(b, "end of Run", result); !errors.Is(err, context.Canceled) {
		b.Fatal(err)
	}
}

// BenchmarkLaneLoopback measures the part of BenchmarkFaultLoopback that the lane takes: a request and its reply.
func BenchmarkLaneLoopback(b *testing.B) {
	const pages = 1 << 12
	lane := dial(b, realSource(b, layout{{kind: uffdtest.Shmem, pages: pages}}), 1).demand[0]
	request := pagewire.Request{Ranges: make([]pagewire.Range, 1)}
	var reply pagewire.Reply
	defer reply.Release()
	b.SetBytes(pageSize)
	b.ReportAllocs()
	for i := uint64(0); b.Loop(); i++ {
		request.Ranges[0] = pagewire.Range{Offset: i % pages * pageSize, Length: pageSize}
		if err := lane.Send(&request); err != nil {
			b.Fatal(err)
		}
		if err := lane.Recv(&reply); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkSweepLoopback measures the sweep over lanes on the loopback, by the number of bulk lanes. No thread of the
// VM runs.
func BenchmarkSweepLoopback(b *testing.B) {
	for _, n := range []int{1, 2, 4} {
		b.Run(fmt.Sprint(n), func(b *testing.B) { benchmarkSweep(b, n) })
	}
}

func benchmarkSweep(b *testing.B, bulk int) {
	const pages = 1 << 15
	l := layout{{kind: uffdtest.Shmem, pages: pages}}
	address := realSource(b, l)
	b.SetBytes(pages * pageSize)
	for b.Loop() {
		b.StopTimer()
		g := newTarget(b, l, Options{})
		g.bulkLanes = bulk
		lanes := dial(b, address, g.workers)
		lanes.more = lanes.open
		b.StartTimer()
		g.StartSweep()
		if err := await(b, "end of Run", g.run(context.Background(), lanes)); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		lanes.cancel()
		g.child.Kill()
		b.StartTimer()
	}
}

// BenchmarkHandleFault measures what a worker does for a fault up to the request, without system calls.
func BenchmarkHandleFault(b *testing.B) {
	const pages = 1 << 16
	g, w, _ := newIdle(b, uffdtest.Shmem, pages)
	g.pages.left.Store(1 << 62)
	g.started.Store(true)
	ev := uffd.Event{Kind: uffd.EventPagefault}
	b.ReportAllocs()
	for i := uint64(0); b.Loop(); i++ {
		p := i * 4099 % pages // no stride that is predicted
		ev.Pagefault.Addr = g.blocks[0].addr(p)
		if err := w.handle(g.uffd, ev, int64(i)); err != nil {
			b.Fatal(err)
		}
		if err := w.send(); err != nil {
			b.Fatal(err)
		}
		g.pending.end(p)
		g.pages.swap(p, demanded, missing)
		w.guesses = w.guesses[:0]
	}
}
