// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"context"
	"errors"
	"slices"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/pagewire"
	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

// TestLostPages: a thread that touches a page that the source cannot read gets SIGBUS. Other pages come. A later engine
// that takes up the memory has the page as lost, too.
func TestLostPages(t *testing.T) {
	uffdtest.Need(t, uffd.FeaturePoison)
	const pages = 16
	g := newTarget(
		t, layout{{kind: uffdtest.Anon, pages: pages}},
		Options{Workers: 1, State: make([]byte, 8), Copies: make([]byte, CopiesSize(1))},
	)
	if !g.CanLose() {
		t.Fatal("the kernel has UFFDIO_POISON, and the engine says that it cannot lose pages")
	}
	lost := func(page, n uint64) pagewire.Run {
		r := pagesOf(page, n)
		r.Lost = true
		return r
	}
	l, theirs := scripted(t, 1)
	result := g.run(context.Background(), l)
	demand, bulk := theirs[0], theirs[1]
	thread := g.read(0, 5, 8)
	demand.asked(t)
	demand.send(t, pageSize, lost(5, 1))
	if v := thread.Join(); v.Errno != syscall.Errno(unix.SIGBUS) {
		t.Errorf("the thread that waited for a lost page: %v, want SIGBUS", v)
	}
	if v := g.read(0, 5, 8).Join(); v.Errno != syscall.Errno(unix.SIGBUS) {
		t.Errorf("one that came later: %v, want SIGBUS", v)
	}
	g.StartSweep()
	for g.Stats().PagesPresent < pages {
		r := bulk.asked(t)
		first, n := r.Offset/pageSize, uint64(r.Length/pageSize)
		in := g.Stats().PagesPresent + n
		for p := first; p < first+n; p++ {
			if p == 9 {
				bulk.send(t, pageSize, lost(9, 1))
			} else {
				bulk.sendPages(t, p, 1)
			}
		}
		until(t, "the run is in", func() bool { return g.Stats().PagesPresent >= in })
	}
	mustEnd(t, result)
	if n := g.Stats().PagesLost; n != 2 {
		t.Errorf("%d pages are lost, of 2", n)
	}
	want := []Range{{Offset: 5 * pageSize, Bytes: pageSize}, {Offset: 9 * pageSize, Bytes: pageSize}}
	if got := g.Lost(16); !slices.Equal(got, want) {
		t.Errorf("lost are %v, want %v", got, want)
	}
	for page := range uint64(pages) {
		v := g.read(0, page, 8).Join()
		if isLost := page == 5 || page == 9; isLost != (v.Errno == syscall.Errno(unix.SIGBUS)) ||
			!isLost && uint64(v.Value) != word(0, page, 8) {
			t.Errorf("page %d in the end: %v", page, v)
		}
	}
}

// TestLostPageIsGivenUp: the process gives a page up just before it is poisoned, because the source has lost it. It
// reads as zero.
func TestLostPageIsGivenUp(t *testing.T) {
	uffdtest.Need(t, uffd.FeaturePoison)
	const page = 1
	g := newTarget(t, layout{{kind: uffdtest.Anon, pages: 2}}, Options{Workers: 1})
	park := g.parkAt("poison", page)
	l, theirs := scripted(t, 1)
	result := g.run(context.Background(), l)
	g.StartSweep()
	bulk := theirs[1]
	if r := bulk.asked(t); r != (pagewire.Range{Length: 2 * pageSize}) {
		t.Fatalf("asked for %v", r)
	}
	r := pagesOf(page, 1)
	r.Lost = true
	bulk.send(t, pageSize, r)
	park.await()
	g.child.Go(uffdtest.Discard(g.blocks[0].page(page))).JoinOK()
	until(t, "marked", func() bool { return g.pages.get(page) == revoked })
	park.unpark()
	bulk.sendPages(t, 0, 1)
	mustEnd(t, result)
	expect(t, g.read(0, page, 0), 0)
	if n := g.Stats().PagesLost; n != 0 {
		t.Errorf("%d pages are lost", n)
	}
}

// TestLostPagesOfSharedMemory: another process that reads a lost page in the RAM file would read zeros. So for shared
// memory the engine does not accept lost pages, and requests none.
func TestLostPagesOfSharedMemory(t *testing.T) {
	g, demand, _, run := start(t, 8, Options{})
	if g.CanLose() {
		t.Error("shared memory can be lost")
	}
	result := run()
	thread := g.read(0, 5, 0)
	demand.asked(t)
	r := pagesOf(5, 1)
	r.Lost = true
	demand.send(t, pageSize, r)
	if err := await(t, "end of Run", result); !errors.Is(err, ErrProtocol) {
		t.Fatalf("Run: %v, want ErrProtocol", err)
	}
	g.resume(8)
	expect(t, thread, word(0, 5, 0))
}
