// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"context"
	"fmt"
	"os"
	"sync/atomic"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

// life is the memory of an engine that remains when its process is killed.
type life struct {
	state, copies []byte
}

func newLife(kind uffdtest.Kind, pages uint64) life {
	state := make([]uint64, StateSize([]Block{{Size: pages * kind.PageSize(), PageSize: kind.PageSize()}})/wordSize)
	copies := make([]uint64, CopiesSize(1)/wordSize)
	return life{bytesOf(state), bytesOf(copies)}
}

func bytesOf(words []uint64) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(&words[0])), len(words)*wordSize)
}

// asKilled returns what would remain if the process were killed now.
func (l life) asKilled() life {
	left := func(memory []byte) []byte {
		words := make([]uint64, len(memory)/wordSize)
		for i := range words {
			words[i] = atomic.LoadUint64((*uint64)(unsafe.Pointer(&memory[i*wordSize])))
		}
		return bytesOf(words)
	}
	return life{left(l.state), left(l.copies)}
}

// next replaces the engine by one that takes up what remained, and runs it with a source that works.
func (g *target) next(left life, kind uffdtest.Kind) <-chan error {
	g.t.Helper()
	b := g.blocks[0]
	second, err := New(Options{
		Blocks: []Block{b.Block}, Workers: 1, State: left.state, Copies: left.copies, Pagemap: g.pagemap,
	})
	if err != nil {
		g.t.Fatal(err)
	}
	g.Engine = second
	return g.run(context.Background(), dial(g.t, realSource(g.t, layout{{kind: kind, pages: b.pages}}), 1))
}

// punch makes a hole of page p in the RAM file by fallocate(2), which makes no event.
func (g *target) punch(p uint64) {
	g.t.Helper()
	r := g.blocks[0].all()
	f, err := os.OpenFile(fmt.Sprintf("/proc/%d/map_files/%x-%x", g.child.Pid, r.Start, r.End()), os.O_RDWR, 0)
	if err != nil {
		g.t.Fatal(err)
	}
	defer f.Close()
	size := int64(g.blocks[0].PageSize)
	if err := unix.Fallocate(
		int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(p)*size, size,
	); err != nil {
		g.t.Fatal(err)
	}
}

// startLife is start with one worker, and memory that remains.
func startLife(
	t *testing.T, kind uffdtest.Kind, pages uint64,
) (g *target, l life, demand *scriptedLane, run func() <-chan error, stop func()) {
	t.Helper()
	l = newLife(kind, pages)
	g = newTarget(t, layout{{kind: kind, pages: pages}}, Options{Workers: 1, State: l.state, Copies: l.copies})
	ours, theirs := scripted(t, 1)
	ctx, cancel := context.WithCancel(context.Background())
	var result <-chan error
	run = func() <-chan error {
		result = g.run(ctx, ours)
		return result
	}
	stop = func() {
		t.Helper()
		cancel()
		ours.cancel()
		_ = await(t, "end of Run", result) // any result will do: the process is killed
	}
	return g, l, theirs[0], run, stop
}

// TestKilledBetweenCopyAndMark: the process is killed when a page was copied and the table does not have it yet. Then
// the guest clears and frees the page, and QEMU makes a hole of it without an event. The page must read as zero.
func TestKilledBetweenCopyAndMark(t *testing.T) {
	for _, kind := range []uffdtest.Kind{uffdtest.Shmem, uffdtest.Hugetlb} {
		for name, punched := range map[string]bool{"punched": true, "kept": false} {
			t.Run(kind.String()+", "+name, func(t *testing.T) {
				const pages, page = 4, 1
				g, l, demand, run, stop := startLife(t, kind, pages)
				park := g.parkAt("copied", page)
				run()
				thread := g.read(0, page, 0)
				demand.answer(t, kind.PageSize())
				park.await()
				expect(t, thread, word(0, page, 0)) // the kernel has woken the thread
				left := l.asKilled()
				if s := (&pageView{left.state}).get(page); s != installing {
					t.Fatalf("the table says %d", s)
				}
				g.child.Go(uffdtest.Write(g.blocks[0].addr(page), 0)).JoinOK()
				if punched {
					g.punch(page)
				}
				park.unpark()
				stop()

				again := g.next(left, kind)
				g.StartSweep()
				mustEnd(t, again)
				expect(t, g.read(0, page, 0), 0)
				if s := g.Stats(); s.PagesPresent != pages {
					t.Errorf("at the end: %+v", s)
				}
				expect(t, g.read(0, 2, 8), word(0, 2, 8))
			})
		}
	}
}

// pageView reads a page table that no engine has taken up.
type pageView struct{ state []byte }

func (v *pageView) get(p uint64) state {
	return state(v.state[p/2] >> (p % 2 * stateBits) & stateMask)
}

// TestKilledWithADiscard: the process gives up pages in every state, and the daemon is killed before it reads the
// event, or after that and before it marks the pages. A page that the guest used here reads as zero. A page that it did
// not use here reads as zero or as it was at the source. No thread waits for ever.
func TestKilledWithADiscard(t *testing.T) {
	for _, point := range []string{"not read", "read"} {
		t.Run(point, func(t *testing.T) {
			const pages = 8
			const here, awaited, untouched = 1, 4, 5 // pages; page 3 of the 8 is zero
			g, l, demand, run, stop := startLife(t, uffdtest.Shmem, pages)
			reads := atomic.Int64{}
			parked, leave := make(chan struct{}), make(chan struct{})
			armed := atomic.Bool{}
			g.park = func(at string, _ uint64) {
				if at == "read" && armed.Load() && reads.Add(1) == 1 {
					close(parked)
					<-leave
				}
			}
			run()
			first := g.read(0, here, 0)
			demand.answer(t, pageSize)
			expect(t, first, word(0, here, 0))
			until(t, "marked", func() bool { return g.pages.get(here) == present })
			g.child.Go(uffdtest.Write(g.blocks[0].addr(here), 0)).JoinOK()
			thread := g.read(0, awaited, 0)
			demand.asked(t)

			all := g.blocks[0].all()
			var discard uffdtest.Pending
			var left life
			if point == "read" {
				armed.Store(true)
				discard = g.child.Go(uffdtest.Punch(all))
				await(t, "reader", parked)
				left = l.asKilled()
				discard.JoinOK() // it returns because the event was read
				close(leave)
				stop()
			} else {
				stop()
				left = l.asKilled()
				discard = g.child.Go(uffdtest.Punch(all))
				discard.WaitWaiting()
			}
			for p, want := range map[uint64]state{here: present, awaited: demanded, untouched: missing} {
				if s := (&pageView{left.state}).get(p); s != want && point == "read" {
					t.Errorf("the table says %d of page %d, want %d", s, p, want)
				}
			}
			again := g.next(left, uffdtest.Shmem)
			g.StartSweep()
			if point == "not read" {
				discard.JoinOK()
			}
			for p, w := range map[uint64]uffdtest.Pending{
				here: g.read(0, here, 0), awaited: thread, untouched: g.read(0, untouched, 0),
			} {
				v := w.JoinOK()
				// A copy that the worker's mark comes too late for brings back what the page was at the source.
				if v != 0 && (p == here || v != word(0, p, 0)) {
					t.Errorf("page %d reads %#x", p, v)
				}
			}
			mustEnd(t, again)
			if point == "not read" && g.Stats().Discarded == 0 {
				t.Error("the discard was not noticed")
			}
		})
	}
}

// TestCopiesOfAnotherVM: answers of the kernel that cannot be for these blocks are passed over.
func TestCopiesOfAnotherVM(t *testing.T) {
	g, l, _, _, _ := startLife(t, uffdtest.Shmem, 4)
	for name, bad := range map[string][]byte{
		"too short": l.copies[:2*uffd.CopyRecordSize-8], "not aligned": l.copies[1:], "none": {},
	} {
		if _, err := New(Options{Blocks: []Block{g.blocks[0].Block}, Workers: 1, Copies: bad}); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
