// SPDX-License-Identifier: Apache-2.0

package pagesrv

import (
	"os"
	"reflect"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/pagewire"
)

// told requests ranges and returns the holes that the replies tell of besides.
func (l testLane) told(t *testing.T, ranges ...pagewire.Range) (holes []pagewire.Run) {
	t.Helper()
	err := l.request(&pagewire.Request{Ranges: ranges, Holes: true}, func(run pagewire.Run, _ []byte) {
		if run.Hole {
			holes = append(holes, run)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return holes
}

// holes returns runs that are holes. The arguments are pairs: the first page, and how many pages.
func holes(pairs ...uint64) (all []pagewire.Run) {
	for ; len(pairs) > 0; pairs = pairs[2:] {
		all = append(all, pagewire.Run{Offset: pairs[0] * 4096, Length: uint32(pairs[1] * 4096), Hole: true})
	}
	return all
}

func rangeOf(page, n uint64) pagewire.Range {
	return pagewire.Range{Offset: page * 4096, Length: uint32(n * 4096)}
}

// sparse makes memory of so many pages, of which only those in data have content. It is a file, or private memory of
// this process.
func sparse(t *testing.T, private bool, pages uint64, data ...uint64) *RAM {
	t.Helper()
	block := Block{ID: "ram", Size: pages * 4096, PageSize: 4096}
	if !private {
		f := ramFile(t, 0, nil)
		if err := f.Truncate(int64(block.Size)); err != nil {
			t.Fatal(err)
		}
		for _, p := range data {
			if _, err := f.WriteAt(pattern(int64(p)), int64(p*4096)); err != nil {
				t.Fatal(err)
			}
		}
		block.Path = f.Name()
		return openRAM(t, block)
	}
	memory, err := unix.Mmap(-1, 0, int(block.Size), unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(memory) })
	_ = unix.Madvise(memory, unix.MADV_NOHUGEPAGE) // fails on a kernel without huge pages, which is fine
	for _, p := range data {
		copy(memory[p*4096:], pattern(int64(p)))
	}
	block.PID, block.Addr = os.Getpid(), uint64(uintptr(unsafe.Pointer(&memory[0])))
	return openRAM(t, block)
}

// TestHolesAreTold: a request is told of all holes behind it, each one once, in a file and in private memory.
func TestHolesAreTold(t *testing.T) {
	const run, pages = holeRun / 4096, 4 * holeRun / 4096
	for name, private := range map[string]bool{"file": false, "private": true} {
		t.Run(name, func(t *testing.T) {
			// Behind the beginning of data at page 4000, a hole is looked for at pages 4001, 4002 and 4004. So page 4003 is
			// not told of.
			data := []uint64{0, 1, 200, 300, 4000, 4001, 4002, run + 5, pages - 1}
			e, lane := offer(t, sparse(t, private, pages, data...))
			want := holes(128, 72, 201, 99, 301, 3699, 4004, run+5-4004, run+6, run, 2*run+6, run, 3*run+6, run-7)
			if got := lane.told(t, rangeOf(0, 128)); !reflect.DeepEqual(got, want) {
				t.Errorf("told of %v, want %v", got, want)
			}
			for _, again := range []pagewire.Range{rangeOf(200, 1), rangeOf(128, 4), rangeOf(0, 1), rangeOf(pages-1, 1)} {
				if got := lane.told(t, again); len(got) != 0 {
					t.Errorf("asked for %v: told of %v once more", again, got)
				}
			}
			if s := e.Stats(); s.HolePages != sumOf(want)/4096 {
				t.Errorf("counted %d pages, want %d", s.HolePages, sumOf(want)/4096)
			}
		})
	}
}

func sumOf(runs []pagewire.Run) (bytes uint64) {
	for _, r := range runs {
		bytes += uint64(r.Length)
	}
	return bytes
}

// TestHolesAreForWhoTakesThem: a request without Holes gets only the pages that it asks for, also if an earlier one had
// Holes.
func TestHolesAreForWhoTakesThem(t *testing.T) {
	e, lane := offer(t, sparse(t, false, 1024, 0, 100))
	silent := func() {
		t.Helper()
		if err := lane.fetch([]pagewire.Range{rangeOf(0, 16)}, func(run pagewire.Run, _ []byte) {
			if run.Hole {
				t.Errorf("told of %v", run)
			}
		}); err != nil {
			t.Fatal(err)
		}
	}
	silent()
	if got, want := lane.told(t, rangeOf(0, 16)), holes(16, 84, 101, 923); !reflect.DeepEqual(got, want) {
		t.Errorf("told of %v, want %v", got, want)
	}
	told := e.Stats().HolePages
	silent()
	if n := e.Stats().HolePages; n != told {
		t.Errorf("told of %d pages", n-told)
	}
}

// TestSearchesCount: each search for a hole counts for the quota. Otherwise a destination could have the source search
// without limit by asking for single pages all over memory.
func TestSearchesCount(t *testing.T) {
	e, lane := offer(t, sparse(t, false, 1<<14, 0, 5000, 10000, 1<<14-1))
	before := e.quota.asked.Load()
	lane.told(t, rangeOf(0, 1)) // finds 3 holes: 1 search for the first, 2 for each of the others, 1 behind them
	lane.told(t, rangeOf(0, 1))
	if n := e.quota.asked.Load() - before; n < 2*4096+5*leastAsked {
		t.Errorf("two requests for a page, and searches for holes, count as %d bytes", n)
	}
}

// TestHolesGoOnWhereTheyEnded: a reply tells of at most holeRuns holes, and the next reply goes on behind them. Where
// holes are rare they are not searched for. Each place where requests go on is remembered by itself.
func TestHolesGoOnWhereTheyEnded(t *testing.T) {
	const apart, count = 100, 3 * holeRuns
	var data []uint64
	for i := range uint64(count) {
		data = append(data, i*apart)
	}
	const dense = count * apart
	for p := uint64(dense); p < dense+400; p++ { // with one hole, which is farther away than holes are searched for
		if p != dense+399 {
			data = append(data, p)
		}
	}
	_, lane := offer(t, sparse(t, false, dense+1000, data...))
	var all []pagewire.Run
	for i := range uint64(5) {
		got := lane.told(t, rangeOf(1+i, 1))
		if len(got) > holeRuns || len(got) == 0 != (i > 2) {
			t.Fatalf("request %d: told of %d holes", i, len(got))
		}
		all = append(all, got...)
	}
	var want []pagewire.Run
	for i := range uint64(count) {
		first := max(2, i*apart+1)
		want = append(want, holes(first, (i+1)*apart-first)...)
	}
	if !reflect.DeepEqual(all, want) {
		t.Errorf("told of %v, want %v", all, want)
	}
	if got := lane.told(t, rangeOf(dense, 128)); len(got) != 0 {
		t.Errorf("within data: told of %v", got)
	}
	if got, want := lane.told(t, rangeOf(dense+128, 272)), holes(dense+400, 600); !reflect.DeepEqual(got, want) {
		t.Errorf("behind data: told of %v, want %v", got, want)
	}
	// Requests at another place go on there, and the first place is not forgotten.
	if got := lane.told(t, rangeOf(dense+500, 8)); len(got) != 0 {
		t.Errorf("told of %v once more", got)
	}
}

// TestHolesFillNoReply: a reply has at most MaxRuns runs. If the answer takes all of them, the next reply tells of the
// holes.
func TestHolesFillNoReply(t *testing.T) {
	var data []uint64
	for p := uint64(0); p < 2*pagewire.MaxRuns; p += 2 {
		data = append(data, p)
	}
	_, lane := offer(t, sparse(t, false, 4096, data...), pagewire.Unpackable) // a bulk lane, which answers in one reply
	if got := lane.told(t, rangeOf(1, pagewire.MaxRuns)); len(got) != 0 {
		t.Errorf("told of %v in a full reply", got)
	}
	got := lane.told(t, rangeOf(pagewire.MaxRuns+1, pagewire.MaxRuns-2))
	if len(got) != 1 || got[0].Offset != (2*pagewire.MaxRuns-1)*4096 {
		t.Errorf("told of %v, want what is behind page %d", got, 2*pagewire.MaxRuns-1)
	}
}

// TestHolesEndWithTheExport: Withdraw waits for a search for holes as for any read, and none begins after it.
func TestHolesEndWithTheExport(t *testing.T) {
	e, lane := offer(t, sparse(t, true, 1024, 0))
	reads := 0
	reading, leave := make(chan struct{}), make(chan struct{})
	e.park = func(string) {
		if reads++; reads == 2 { // the first read is of the page that was requested
			close(reading)
			<-leave
		}
	}
	if err := lane.SendMsg(&pagewire.Request{Ranges: []pagewire.Range{rangeOf(0, 1)}, Holes: true}); err != nil {
		t.Fatal(err)
	}
	<-reading
	withdrawn := make(chan struct{})
	go func() {
		e.Withdraw()
		close(withdrawn)
	}()
	eventually(t, "withdrawn", e.withdrawn.Load)
	select {
	case <-withdrawn:
		t.Error("Withdraw did not wait for the search")
	default:
	}
	close(leave)
	<-withdrawn
}

// TestTellingAllocatesNothing: holes are told of in the reply's runs, which are reused.
func TestTellingAllocatesNothing(t *testing.T) {
	e, _ := offer(t, sparse(t, false, 1<<14, 0, 5000, 10000, 1<<14-1))
	l := &lane{export: e, idle: make(chan struct{}, 1)}
	l.request.Holes = true
	l.request.Ranges = []pagewire.Range{rangeOf(0, 1)}
	if n := testing.AllocsPerRun(100, func() {
		l.scouted = [scouts]scouted{}
		l.reply.Runs = append(l.reply.Runs[:0], pagewire.Run{Length: 4096})
		if err := l.tellHoles(); err != nil || len(l.reply.Runs) != 4 {
			t.Fatal(err, l.reply.Runs)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
