// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

// mapped maps the memory of block i in this process, which is another process for the VM. The userfaultfd does not see
// accesses by way of this mapping.
func (g *target) mapped(i int) []byte {
	g.t.Helper()
	b := &g.blocks[i]
	memory, err := unix.Mmap(int(b.File.Fd()), b.FileOffset, int(b.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() {
		if err := unix.Munmap(memory); err != nil {
			g.t.Error(err)
		}
	})
	return memory
}

// TestForeignReader: another process reads the RAM file before and during the migration. It reads zeros where pages
// have not come. The VM must read the right content everywhere.
func TestForeignReader(t *testing.T) {
	for _, c := range []struct {
		name string
		l    layout
		part uint64
	}{
		{"tmpfs", layout{{kind: uffdtest.Shmem, pages: 2048}}, partSize},
		{"hugetlbfs", layout{{kind: uffdtest.Hugetlb, pages: 8}}, partSize},
		{"in parts", layout{{kind: uffdtest.Hugetlb, pages: 8}}, 256 << 10},
	} {
		for _, populated := range []bool{false, true} {
			t.Run(c.name, func(t *testing.T) {
				inParts(t, c.part)
				g := newTarget(t, c.l, Options{})
				g.blocks[0].Populated = populated
				memory, size := g.mapped(0), g.blocks[0].PageSize
				content := uint64(0) // pages that another process touched, and that are not zero
				for p := uint64(0); p < c.l[0].pages; p += 2 {
					if memory[p*size] != 0 {
						t.Fatalf("page %d is there", p)
					}
					if c.part != partSize || populated || !isZero(0, p) {
						content++
					}
				}
				var over atomic.Bool
				reading := make(chan byte)
				go func() {
					sum := byte(0)
					for random := rand.New(rand.NewPCG(5, 6)); !over.Load(); {
						sum += memory[random.Uint64N(uint64(len(memory)))]
					}
					reading <- sum
				}()
				defer func() { <-reading }()
				defer over.Store(true)
				result := g.run(context.Background(), dial(t, realSource(t, c.l), defaultWorkers))
				g.touch(rand.New(rand.NewPCG(1, 2)), 100)
				g.StartSweep()
				g.touch(rand.New(rand.NewPCG(3, 4)), 100)
				mustEnd(t, result)
				g.verify()
				if s := g.Stats(); s.PagesTouched < content/2 || s.PagesUnexplained != 0 {
					t.Errorf("of %d pages with content that were touched: %+v", content, s)
				}
			})
		}
	}
}

// TestInstalledPagesRaiseNoFault: pages that the engine has installed are mapped, so there are no minor faults where no
// other process touches the memory.
func TestInstalledPagesRaiseNoFault(t *testing.T) {
	const pages = 4
	for _, kind := range []uffdtest.Kind{uffdtest.Shmem, uffdtest.Hugetlb} {
		g, w, l := newIdle(t, kind, pages)
		b := &g.blocks[0]
		if !b.minor {
			t.Fatalf("%v is not registered for minor faults", kind)
		}
		for p := range uint64(pages) {
			if err := w.handle(g.uffd, uffd.Event{
				Kind: uffd.EventPagefault, Pagefault: faultAt(b.addr(p)),
			}, g.now()); err != nil {
				t.Fatal(err)
			}
			l.asked.Store(int64(b.PageSize))
			l.reply.Runs, l.reply.Data = append(l.reply.Runs[:0], pagesOf(p, 1)), make([]byte, b.PageSize)
			l.reply.Runs[0].Offset, l.reply.Runs[0].Length = p*b.PageSize, uint32(b.PageSize)
			if p == 1 {
				l.reply.Runs[0].Zero, l.reply.Data = true, nil
			}
			if err := w.s.accept(l); err != nil {
				t.Fatal(err)
			}
		}
		g.child.Go(uffdtest.Touch(b.all(), kind)).JoinOK() // would wait for ever if there were a fault
		g.child.Go(uffdtest.Write(b.Addr, 1)).JoinOK()
		if _, err := g.uffd.Read(w.events); !errors.Is(err, uffd.ErrWouldBlock) {
			t.Errorf("%v: a message: %v", kind, err)
		}
	}
}

// faultAt is the event of a fault on a missing page.
func faultAt(addr uint64) (f struct {
	Addr     uint64
	Flags    uffd.FaultFlags
	ThreadID uint32
}) {
	f.Addr = addr
	return f
}

// TestPagesThatTheKernelTookAway: a page that had come, and that the kernel has unmapped since, is mapped again at the
// next fault, with its neighbours. Its content is kept.
func TestPagesThatTheKernelTookAway(t *testing.T) {
	g, _, bulk, run := start(t, 16, Options{})
	memory := g.mapped(0)
	g.StartSweep()
	result := run()
	bulk.asked(t)
	bulk.send(t, pageSize, pagesOf(0, 8))
	until(t, "installed", func() bool { return g.Stats().PagesPresent == 8 })
	for p := range uint64(8) { // the hole unmaps the page, and what is written then is in the file only
		g.punch(p)
		memory[p*pageSize] = 42
	}
	expect(t, g.read(0, 2, 0), 42)
	for p := uint64(3); p < 8; p++ {
		expect(t, g.read(0, p, 0), 42)
	}
	if s := g.Stats(); s.Faults != 1 {
		t.Errorf("%d faults", s.Faults)
	}
	g.punch(1) // this page is a hole
	expect(t, g.read(0, 1, 0), 0)
	bulk.send(t, pageSize, pagesOf(8, 8))
	mustEnd(t, result)
	if s := g.Stats(); s.PagesTouched != 0 || s.PagesUnexplained != 0 {
		t.Errorf("at the end: %+v", s)
	}
}

// TestKilledBeforeItIsWritten: the kernel says that a page exists, because another process touched it, and the daemon
// is killed. The page has not come until the daemon has written it. From then on what the VM writes must stay.
func TestKilledBeforeItIsWritten(t *testing.T) {
	for _, point := range []string{"exists", "written", "copied"} {
		t.Run(point, func(t *testing.T) {
			const pages, page = 8, 5
			g, l, demand, run, stop := startLife(t, uffdtest.Shmem, pages)
			memory := g.mapped(0)
			if memory[page*pageSize] != 0 {
				t.Fatal("the page is there")
			}
			park := g.parkAt(point, page)
			run()
			thread := g.read(0, page, 0)
			demand.answer(t, pageSize)
			park.await()
			want := word(0, page, 0)
			if point == "copied" { // the VM continues
				expect(t, thread, want)
				g.child.Go(uffdtest.Write(g.blocks[0].addr(page), 7)).JoinOK()
				want = 7
			}
			left := l.asKilled()
			if s := (&pageView{left.state}).get(page); s != installing {
				t.Fatalf("the table says %d", s)
			}
			park.unpark()
			stop()
			if point != "copied" { // the file gets what it had when the daemon was killed, and nobody maps it
				expect(t, thread, want)
				g.punch(page)
				if memory[page*pageSize] != 0 {
					t.Fatal("the page is there")
				}
				if point == "written" {
					fill(memory[page*pageSize:][:pageSize], 0, page)
				}
			}
			again := g.next(left, uffdtest.Shmem)
			g.StartSweep()
			mustEnd(t, again)
			expect(t, g.read(0, page, 0), want)
		})
	}
}
