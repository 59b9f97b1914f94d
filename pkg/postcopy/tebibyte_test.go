// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/pagelane"
	"github.com/migrated-vm/migrated/pkg/pagesrv"
	"github.com/migrated-vm/migrated/pkg/pagewire"
	"github.com/migrated-vm/migrated/pkg/testenv"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

// tebibyte is 1 TiB in pages. With the race detector it is less, because that needs several bytes for each byte of a
// table, and far longer.
func tebibyte() uint64 {
	if raceDetector {
		return 1 << 24
	}
	return 1 << 28
}

// atBorders returns pages at the borders of the table's words, of the runs by which holes are told of, and of memory.
func atBorders(pages uint64) []uint64 {
	const run = 2 << 30 / pageSize
	return []uint64{0, 1, 15, 16, 17, 63, 64, 65, 4096, run - 1, run, 3*run + 1, pages/2 + 5, pages/2 + 6, pages - 1}
}

// sparseSource serves memory that has content in these pages only. It is a file, or private memory of this process.
func sparseSource(t testing.TB, kind uffdtest.Kind, pages uint64, data []uint64) (string, *pagesrv.Export) {
	t.Helper()
	size := pages * pageSize
	block := pagesrv.Block{ID: "ram0", Size: size, PageSize: pageSize}
	fd, flags := -1, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS
	if kind == uffdtest.Shmem {
		var err error
		if fd, err = unix.MemfdCreate("source", unix.MFD_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		if err := unix.Ftruncate(fd, int64(size)); err != nil {
			t.Fatal(err)
		}
		block.Path, flags = fmt.Sprintf("/proc/self/fd/%d", fd), unix.MAP_SHARED
	}
	memory, err := unix.Mmap(fd, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, flags|unix.MAP_NORESERVE)
	if err != nil {
		testenv.CannotRun(t, "mmap of %d bytes: %v", size, err)
	}
	t.Cleanup(func() { _ = unix.Munmap(memory) })
	_ = unix.Madvise(memory, unix.MADV_NOHUGEPAGE) // fails on a kernel without huge pages, which is fine
	for _, p := range data {
		fillOdd(memory[p*pageSize:(p+1)*pageSize], p)
	}
	if kind == uffdtest.Anon {
		block.PID, block.Addr = os.Getpid(), uint64(uintptr(unsafe.Pointer(&memory[0])))
	}
	return offer(t, block)
}

// fillOdd makes the content of a page, which is never zero.
func fillOdd(dst []byte, page uint64) {
	for i := range dst {
		dst[i] = byte(page*31+uint64(i)) | 1
	}
}

// TestTebibyte moves a VM of 1 TiB that is nearly empty. It checks the counts of pages and of requests, the pages that
// are there afterwards, and the memory that both ends allocate.
func TestTebibyte(t *testing.T) {
	for _, kind := range []uffdtest.Kind{uffdtest.Shmem, uffdtest.Anon} {
		t.Run(kind.String(), func(t *testing.T) {
			pages := tebibyte()
			data := atBorders(pages)
			address, export := sparseSource(t, kind, pages, data)
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			g := newTarget(t, layout{{kind: kind, pages: pages}}, Options{})
			l := dial(t, address, defaultWorkers)
			g.StartSweep()
			mustEnd(t, g.run(context.Background(), l))
			runtime.ReadMemStats(&after)

			// Everything that was ever allocated: the tables and lanes of both ends, and what was freed again.
			if n := after.TotalAlloc - before.TotalAlloc; n > pages {
				t.Errorf("%d bytes were allocated for %d pages: more than a byte each", n, pages)
			} else {
				t.Logf("%.2f bytes were allocated for a page", float64(n)/float64(pages))
			}
			s, served := g.Stats(), export.Stats()
			if s.PagesTotal != pages || s.PagesPresent != pages || s.PagesZero != pages-uint64(len(data)) {
				t.Errorf("%d of %d pages are there, %d as zero, of which %d have data",
					s.PagesPresent, s.PagesTotal, s.PagesZero, len(data))
			}
			if s.BulkPages+s.DemandPages != pages {
				t.Errorf("%d pages came on the bulk lane and %d on demand lanes, of %d", s.BulkPages, s.DemandPages, pages)
			}
			if most := uint64(256); served.Requests > most {
				t.Errorf("%d requests, at most %d are needed", served.Requests, most)
			}
			g.verifySparse(data)
		})
	}
}

// verifySparse compares the memory around the pages in data, and checks that no other page is there.
func (g *target) verifySparse(data []uint64) {
	g.t.Helper()
	b := &g.blocks[0]
	var there []uint64
	for at := b.Addr; ; at += pageSize {
		next, err := g.pagemap.Next(at, b.Addr+b.Size)
		if err != nil {
			g.t.Fatal(err)
		}
		if at = next; at == b.Addr+b.Size {
			break
		}
		there = append(there, (at-b.Addr)/pageSize)
	}
	if !slices.Equal(there, data) {
		g.t.Errorf("the process has pages %v, want %v", there, data)
	}
	if b.File != nil {
		info, err := b.File.Stat()
		if err != nil {
			g.t.Fatal(err)
		}
		if n := allocated(info) / pageSize; n != uint64(len(data)) {
			g.t.Errorf("its file has %d pages, want %d", n, len(data))
		}
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", g.child.Pid))
	if err != nil {
		g.t.Fatal(err)
	}
	defer mem.Close()
	got, want := make([]byte, pageSize), make([]byte, pageSize)
	for _, p := range data {
		for q := max(p, 1) - 1; q <= min(p+1, b.pages-1); q++ {
			if _, err := mem.ReadAt(got, int64(b.addr(b.first+q))); err != nil {
				g.t.Fatal(err)
			}
			if clear(want); slices.Contains(data, q) {
				fillOdd(want, q)
			}
			if !bytes.Equal(got, want) {
				g.t.Errorf("page %d is wrong (state %d): % x…", q, g.pages.get(b.first+q), got[:16])
			}
		}
	}
}

// TestMapOfATebibyte: Stats, which is called each second, does not go through the table. Map does, and is called when
// somebody looks at it. Both are right for a table of that size.
func TestMapOfATebibyte(t *testing.T) {
	pages := tebibyte()
	g := newTarget(t, layout{{kind: uffdtest.Shmem, pages: pages}}, Options{})
	table := g.pages.words
	g.pages.words = nil // going through the table panics
	if s := g.Stats(); s.PagesTotal != pages || s.PagesPresent != 0 {
		t.Errorf("%d of %d pages are there", s.PagesPresent, s.PagesTotal)
	}
	g.pages.words = table
	for p, s := range map[uint64]state{0: zero, 5: demanded, pages / 2: present, pages - 1: zero} {
		g.pages.swap(p, missing, s)
	}
	m := g.Map()[0]
	if len(m.Cells) > MostCells {
		t.Errorf("%d cells, at most %d", len(m.Cells), MostCells)
	}
	var sum Cell
	for _, c := range m.Cells {
		sum.add(c)
	}
	if want := (Cell{Missing: uint32(pages - 4), Waited: 1, Present: 1, Zero: 2}); sum != want {
		t.Errorf("the map has %+v, want %+v", sum, want)
	}
}

// asking is a lane to a source that does not tell of holes.
type asking struct{ *pagelane.Client }

func (a asking) Send(request *pagewire.Request) error {
	request.Holes = false
	return a.Client.Send(request)
}

// BenchmarkTebibyte measures Run for nearly empty memory: 1 TiB as a file and as private memory, 64 GiB with a page of
// data in every 2 MiB, and 64 GiB from a source that does not tell of holes.
func BenchmarkTebibyte(b *testing.B) {
	for _, c := range []struct {
		name  string
		kind  uffdtest.Kind
		pages uint64
		every uint64 // one page in so many has data; 0: some at borders have
		asks  bool   // the source does not tell of holes
	}{
		{"1 TiB shared", uffdtest.Shmem, 1 << 28, 0, false},
		{"1 TiB private", uffdtest.Anon, 1 << 28, 0, false},
		{"64 GiB shared", uffdtest.Shmem, 1 << 24, 0, false},
		{"64 GiB shared, asked for", uffdtest.Shmem, 1 << 24, 0, true},
		{"64 GiB scattered", uffdtest.Shmem, 1 << 24, 512, false},
		{"64 GiB scattered, asked for", uffdtest.Shmem, 1 << 24, 512, true},
	} {
		data := atBorders(c.pages)
		if c.every != 0 {
			data = data[:0]
			for p := uint64(0); p < c.pages; p += c.every {
				data = append(data, p+p/c.every*37%c.every)
			}
		}
		b.Run(c.name, func(b *testing.B) {
			for range b.N {
				b.StopTimer()
				address, export := sparseSource(b, c.kind, c.pages, data)
				g := newTarget(b, layout{{kind: c.kind, pages: c.pages}}, Options{})
				l := dial(b, address, defaultWorkers)
				if c.asks {
					l.bulk = asking{l.bulk.(*pagelane.Client)}
				}
				g.StartSweep()
				b.StartTimer()
				if err := g.Run(context.Background(), l.demand, l.bulk, nil); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				b.ReportMetric(float64(export.Stats().Requests), "requests/op")
				began := time.Now()
				g.Map()
				b.ReportMetric(float64(time.Since(began).Nanoseconds()), "ns/map")
				began = time.Now()
				g.Stats()
				b.ReportMetric(float64(time.Since(began).Nanoseconds()), "ns/stats")
				g.child.Kill()
			}
		})
	}
}
