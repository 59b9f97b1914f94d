// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/pkg/pagewire"
	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

// startLanes runs a target whose sweep has n lanes over a script. bulk has them in the order in which they were opened.
func startLanes(
	t *testing.T, pages uint64, n int,
) (g *target, demand *scriptedLane, bulk []*scriptedLane, result <-chan error) {
	t.Helper()
	g = newTarget(t, layout{{kind: uffdtest.Shmem, pages: pages}}, Options{Workers: 1})
	g.bulkLanes = n
	l, theirs := scripted(t, 1)
	l.more = l.open
	g.StartSweep()
	result = g.run(context.Background(), l)
	bulk = theirs[1:]
	for range n - 1 {
		bulk = append(bulk, await(t, "lane", l.script.lanes))
	}
	until(t, "all lanes in use", func() bool { return g.Stats().BulkLanes == uint64(n) })
	return g, theirs[0], bulk, result
}

// answerUntil answers the requests on l until one comes on other, which it returns.
func (l *scriptedLane) answerUntil(t *testing.T, other *scriptedLane) pagewire.Range {
	t.Helper()
	for {
		select {
		case r := <-other.requests:
			return r
		case <-time.After(patience):
			t.Fatal("neither lane is asked for anything")
		case r := <-l.requests:
			l.sendPages(t, r.Offset/pageSize, uint64(r.Length)/pageSize)
		}
	}
}

// TestOneOfSeveralLanesLost: if one bulk lane is lost, its requests that were not answered are requested on another
// one, and the session goes on. That holds for the first lane, too.
func TestOneOfSeveralLanesLost(t *testing.T) {
	for name, lost := range map[string]int{"first": 0, "second": 1} {
		t.Run(name, func(t *testing.T) {
			const pages = 1 << 13
			g, demand, bulk, result := startLanes(t, pages, 2)
			gone, stays := bulk[lost], bulk[1-lost]
			if lost == 0 { // before the second lane opened, the first one requested all that it may
				r := gone.asked(t)
				gone.sendPages(t, r.Offset/pageSize, uint64(r.Length)/pageSize)
			}
			r := stays.answerUntil(t, gone)
			first, n := r.Offset/pageSize, uint64(r.Length)/pageSize
			gone.sendPages(t, first, 2)
			until(t, "two of its pages", func() bool { s := g.pages.get(first + 1); return s == present || s == zero })
			thread := g.read(0, first+5, 0)
			if r := demand.asked(t); r != pagesAsked(first+5, 1) {
				t.Fatalf("asked for %v on the demand lane", r)
			}
			gone.end <- status.Error(codes.Unavailable, "cut")
			until(t, "a lane is lost", func() bool { s := g.Stats(); return s.BulkLanesLost == 1 && s.BulkLanes == 1 })
			var again []uint64
			deadline := time.After(patience)
			for done := false; !done; {
				select {
				case <-deadline:
					t.Fatalf("%d of %d pages came; %v were asked for again", g.Stats().PagesPresent, pages, again)
				case r := <-stays.requests:
					for p := r.Offset / pageSize; p < (r.Offset+uint64(r.Length))/pageSize; p++ {
						if p >= first && p < first+n {
							again = append(again, p)
						}
					}
					stays.sendPages(t, r.Offset/pageSize, uint64(r.Length)/pageSize)
				default:
					done = g.Stats().PagesPresent == pages-1
				}
			}
			slices.Sort(again)
			want := []uint64{}
			for p := first + 2; p < first+n; p++ {
				if p != first+5 { // was requested on a demand lane
					want = append(want, p)
				}
			}
			if !slices.Equal(again, want) {
				t.Errorf("of pages %d to %d, %v were asked for again, want %v", first, first+n-1, again, want)
			}
			demand.sendPages(t, first+5, 1)
			expect(t, thread, word(0, first+5, 0))
			mustEnd(t, result)
			g.verify()
			if s := g.Stats(); s.MostBulkLanes != 2 || s.BulkLanes != 0 {
				t.Errorf("%d lanes are in use after Run, %d were", s.BulkLanes, s.MostBulkLanes)
			}
		})
	}
}

func pagesAsked(page, n uint64) pagewire.Range {
	return pagewire.Range{Offset: page * pageSize, Length: uint32(n * pageSize)}
}

// TestAllLanesLost: the session ends when the last bulk lane is lost, with the error of that lane.
func TestAllLanesLost(t *testing.T) {
	const pages = 1 << 12
	g, _, bulk, result := startLanes(t, pages, 3)
	for i, l := range bulk[:2] {
		bulk[2].answerUntil(t, l) // only a lane with requests in flight notices its end
		l.end <- status.Error(codes.Unavailable, "cut")
		until(t, "a lane is lost", func() bool { return g.Stats().BulkLanesLost == uint64(i+1) })
	}
	bulk[2].end <- status.Error(codes.DataLoss, "no RAM")
	if err := await(t, "end of Run", result); !errors.Is(err, ErrLaneLost) || status.Code(err) != codes.DataLoss {
		t.Fatalf("Run: %v, want ErrLaneLost and the last lane's status", err)
	}
	g.resume(pages)
}

// TestMalformedOnOneOfSeveralLanes: a malformed reply ends the session, also if there are other bulk lanes.
func TestMalformedOnOneOfSeveralLanes(t *testing.T) {
	const pages = 1 << 12
	g, _, bulk, result := startLanes(t, pages, 2)
	bulk[0].answerUntil(t, bulk[1])
	bulk[1].send(t, pageSize, pagesOf(pages-1, 1)) // was not requested
	if err := await(t, "end of Run", result); !errors.Is(err, ErrProtocol) {
		t.Fatalf("Run: %v, want ErrProtocol", err)
	}
	if s := g.Stats(); s.BulkLanesLost != 0 {
		t.Errorf("%d lanes were lost", s.BulkLanesLost)
	}
}

// TestNoOtherLane: if the source refuses another bulk lane, the sweep goes on with those that it has.
func TestNoOtherLane(t *testing.T) {
	l := layout{{kind: uffdtest.Shmem, pages: 1 << 12}}
	g := newTarget(t, l, Options{})
	g.bulkLanes = 4
	lanes := dial(t, realSource(t, l), g.workers)
	refused := make(chan struct{}, 8)
	lanes.more = func(context.Context) (Lane, error) {
		refused <- struct{}{}
		return nil, status.Error(codes.ResourceExhausted, "64 are open")
	}
	g.StartSweep()
	mustEnd(t, g.run(context.Background(), lanes))
	g.verify()
	if len(refused) != 3 || g.Stats().MostBulkLanes != 1 {
		t.Errorf("%d lanes were asked for, %d used", len(refused), g.Stats().MostBulkLanes)
	}
}

// TestEndWhileALaneOpens: a lane that opens when the session has ended is closed, and Run returns after that.
func TestEndWhileALaneOpens(t *testing.T) {
	g := newTarget(t, layout{{kind: uffdtest.Shmem, pages: 1 << 12}}, Options{Workers: 1})
	g.bulkLanes = 2
	l, _ := scripted(t, 1)
	opened := make(chan Lane, 1)
	l.more = func(ctx context.Context) (Lane, error) {
		lane, err := l.open(ctx)
		opened <- lane
		<-ctx.Done()
		return lane, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	g.StartSweep()
	result := g.run(ctx, l)
	lane := await(t, "lane", opened)
	cancel()
	if err := await(t, "end of Run", result); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if err := lane.Recv(new(pagewire.Reply)); err == nil {
		t.Error("the lane lives")
	}
}

// TestSweepOverSeveralLanes: the sweep uses several lanes while threads fault.
func TestSweepOverSeveralLanes(t *testing.T) {
	const pages = 1 << 12
	for _, n := range []int{2, 1000} {
		l := layout{{kind: uffdtest.Shmem, pages: pages}, {kind: uffdtest.Anon, pages: 1 << 8}}
		g := newTarget(t, l, Options{})
		g.bulkLanes = n
		lanes := dial(t, realSource(t, l), g.workers)
		lanes.more = lanes.open
		g.StartSweep()
		result := g.run(context.Background(), lanes)
		for range 50 {
			p := rand.Uint64N(pages)
			expect(t, g.read(0, p, 8), word(0, p, 8))
		}
		mustEnd(t, result)
		g.verify()
		if most := g.Stats().MostBulkLanes; most > uint64(min(n, mostBulkLanes)) {
			t.Errorf("%d lanes, %d were wanted", most, n)
		}
	}
}

// TestRecordsBoundLanes: if the memory of an earlier engine has room for the copies of one bulk lane only, the sweep
// uses one.
func TestRecordsBoundLanes(t *testing.T) {
	l := layout{{kind: uffdtest.Shmem, pages: 1 << 12}}
	g := newTarget(t, l, Options{Workers: 2, Copies: make([]byte, 4*uffd.CopyRecordSize)})
	g.bulkLanes = 4
	lanes := dial(t, realSource(t, l), g.workers)
	lanes.more = lanes.open
	g.StartSweep()
	mustEnd(t, g.run(context.Background(), lanes))
	g.verify()
	if most := g.Stats().MostBulkLanes; most != 1 || g.mostLanes() != 1 {
		t.Errorf("%d lanes were used, at most %d are to be", most, g.mostLanes())
	}
}

// TestSettle: a bulk lane forgets what was answered, in order and to the byte.
func TestSettle(t *testing.T) {
	b := bulkLane{owes: []pagewire.Range{pagesAsked(0, 4), pagesAsked(10, 2), pagesAsked(20, 1)}}
	for _, step := range []struct {
		pages uint64
		want  []pagewire.Range
	}{
		{1, []pagewire.Range{pagesAsked(1, 3), pagesAsked(10, 2), pagesAsked(20, 1)}},
		{3, []pagewire.Range{pagesAsked(10, 2), pagesAsked(20, 1)}},
		{0, []pagewire.Range{pagesAsked(10, 2), pagesAsked(20, 1)}},
		{3, nil},
	} {
		if b.settle(step.pages * pageSize); !slices.Equal(b.owes, step.want) {
			t.Errorf("after %d pages more, %v are owed, want %v", step.pages, b.owes, step.want)
		}
	}
}

// TestSharesFillTheWindow: all bulk lanes together fill the window, also if the share of each is no whole number of
// runs.
func TestSharesFillTheWindow(t *testing.T) {
	for n := 1; n <= mostBulkLanes; n++ {
		for window := int64(2 * leastRun); window < 64*leastRun; window += 10_000 {
			k := bulk{pace: newPace(newBudget(0)), scale: scale{lanes: n}}
			k.pace.window, k.pace.run = window, leastRun
			for range n {
				k.lanes = append(k.lanes, &lane{bulk: &bulkLane{}})
			}
			for range 3 { // after each answer, each lane that has room requests more
				for asks := true; asks; {
					asks = false
					for _, l := range k.lanes {
						if room := int64(k.room(l, false)); room > 0 {
							l.asked.Add(room)
							k.inFlight += room
							asks = true
						}
					}
				}
				if k.inFlight > window || k.inFlight+leastRun <= window {
					t.Fatalf("%d lanes have %d bytes in flight, the window has %d", n, k.inFlight, window)
				}
				first := k.lanes[0]
				k.inFlight -= first.asked.Swap(0)
			}
		}
	}
}
