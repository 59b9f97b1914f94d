// SPDX-License-Identifier: Apache-2.0

package pagesrv

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"syscall"
	"testing"

	"pgregory.net/rapid"

	"github.com/migrated-vm/migrated/pkg/pagewire"
)

// TestFetchYieldsTheFile: random requests get each page as often as they ask for it, with the content of the file.
func TestFetchYieldsTheFile(t *testing.T) {
	const size = 4 << 20
	f := ramFile(t, size, mixed)
	content, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	blocks := []Block{
		{ID: "small", Path: f.Name(), Size: size, PageSize: 4096},
		{ID: "part", Path: f.Name(), Offset: 3 * 4096, Size: 1 << 20, PageSize: 4096},
		{ID: "medium", Path: f.Name(), Size: size, PageSize: 64 << 10},
		{ID: "huge", Path: f.Name(), Size: size, PageSize: 2 << 20},
	}
	_, lane := offer(t, openRAM(t, blocks...))
	none := make([]byte, size)
	rapid.Check(t, func(t *rapid.T) {
		type page struct {
			block uint32
			at    uint64
		}
		want := map[page]int{}
		var ranges []pagewire.Range
		for range rapid.IntRange(1, 6).Draw(t, "ranges") {
			number := rapid.Uint32Range(0, uint32(len(blocks)-1)).Draw(t, "block")
			b := blocks[number]
			count := b.Size / b.PageSize
			first := rapid.Uint64Range(0, count-1).Draw(t, "first page")
			pages := rapid.Uint64Range(1, min(count-first, 160)).Draw(t, "pages")
			if rapid.IntRange(0, 3).Draw(t, "kind") == 0 {
				pages = 1
			}
			if pages*b.PageSize > 2<<20 {
				pages = (2 << 20) / b.PageSize
			}
			ranges = append(ranges, pagewire.Range{
				Block: number, Offset: first * b.PageSize, Length: uint32(pages * b.PageSize),
			})
			for i := range pages {
				want[page{number, (first + i) * b.PageSize}]++
			}
		}
		err := lane.fetch(ranges, func(run pagewire.Run, data []byte) {
			b := blocks[run.Block]
			if run.Zero {
				data = none[:run.Length]
			}
			for i := uint64(0); i < uint64(run.Length); i += b.PageSize {
				at := run.Offset + i
				expect := content[uint64(b.Offset)+at:][:b.PageSize]
				if !bytes.Equal(data[i:i+b.PageSize], expect) {
					t.Fatalf("block %s, page at %#x (zero: %v) differs from the file", b.ID, at, run.Zero)
				}
				if run.Zero != bytes.Equal(expect, none[:len(expect)]) {
					t.Fatalf("block %s, page at %#x: zero is %v", b.ID, at, run.Zero)
				}
				want[page{run.Block, at}]--
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		for p, n := range want {
			if n != 0 {
				t.Fatalf("page %+v: %d answers are missing", p, n)
			}
		}
	})
}

// TestRepliesOfBulkRequests: a run of the sweep and a huge page come in one reply, whether they are data or a hole.
func TestRepliesOfBulkRequests(t *testing.T) {
	const size = 8 << 20
	f := ramFile(t, size, func(page int64) []byte {
		if page >= 1024 {
			return nil
		}
		return pattern(page)
	})
	ram := openRAM(t, Block{ID: "ram", Path: f.Name(), Size: size, PageSize: 4096},
		Block{ID: "huge", Path: f.Name(), Size: size, PageSize: 2 << 20})
	_, lane := offer(t, ram, "")
	for _, test := range []struct {
		name  string
		ask   pagewire.Range
		zero  bool
		bytes int
	}{
		{"512 KiB of data", pagewire.Range{Offset: 1 << 20, Length: 512 << 10}, false, 512 << 10},
		{"4 MiB of hole", pagewire.Range{Offset: 4 << 20, Length: 4 << 20}, true, 0},
		{"huge page of data", pagewire.Range{Block: 1, Offset: 2 << 20, Length: 2 << 20}, false, 2 << 20},
		{"huge page of hole", pagewire.Range{Block: 1, Offset: 4 << 20, Length: 2 << 20}, true, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			if err := lane.SendMsg(&pagewire.Request{Ranges: []pagewire.Range{test.ask}}); err != nil {
				t.Fatal(err)
			}
			var reply pagewire.Reply
			defer reply.Release()
			if err := lane.RecvMsg(&reply); err != nil {
				t.Fatal(err)
			}
			want := pagewire.Run{Block: test.ask.Block, Offset: test.ask.Offset, Length: test.ask.Length, Zero: test.zero}
			if len(reply.Runs) != 1 || reply.Runs[0] != want || len(reply.Data) != test.bytes {
				t.Fatalf("%d bytes in runs %+v, want %+v", len(reply.Data), reply.Runs, want)
			}
		})
	}
}

// TestRepliesAreOfTheWantedPieces: a request may say how many bytes each of its replies carries.
func TestRepliesAreOfTheWantedPieces(t *testing.T) {
	const ask = 256 << 10
	ram := openRAM(t, Block{ID: "ram", Path: ramFile(t, 2<<20, pattern).Name(), Size: 2 << 20, PageSize: 4096},
		Block{ID: "huge", Path: ramFile(t, 2<<20, pattern).Name(), Size: 2 << 20, PageSize: 2 << 20})
	_, lane := offer(t, ram, "")
	for _, c := range []struct {
		piece uint32
		want  int
	}{
		{0, ask}, {64 << 10, 64 << 10}, {pagewire.LeastPiece, pagewire.LeastPiece}, {1, pagewire.LeastPiece},
		{40 << 10, 40 << 10}, {8 << 20, ask},
	} {
		got := repliesTo(t, lane, pagewire.Request{Ranges: []pagewire.Range{{Length: ask}}, Piece: c.piece})
		if largest := slices.Max(got); largest != c.want || len(got) != (ask+c.want-1)/c.want {
			t.Errorf("pieces of %d bytes: replies of %d", c.piece, got)
		}
	}
	got := repliesTo(t, lane, pagewire.Request{
		Ranges: []pagewire.Range{{Block: 1, Length: 2 << 20}}, Piece: pagewire.LeastPiece,
	})
	if !slices.Equal(got, []int{2 << 20}) {
		t.Errorf("a page of 2 MiB: replies of %d bytes", got)
	}
}

// repliesTo returns how many bytes each reply to a request carries.
func repliesTo(t *testing.T, lane testLane, request pagewire.Request) (bytes []int) {
	t.Helper()
	left := 0
	for _, r := range request.Ranges {
		left += int(r.Length)
	}
	if err := lane.SendMsg(&request); err != nil {
		t.Fatal(err)
	}
	for left > 0 {
		var reply pagewire.Reply
		if err := lane.RecvMsg(&reply); err != nil {
			t.Fatal(err)
		}
		bytes = append(bytes, len(reply.Data))
		left -= len(reply.Data)
		reply.Release()
	}
	return bytes
}

// TestDemandRepliesGrow: on a slow link the first reply on a demand lane is small, so that the page that a thread waits
// for comes first. The next replies are larger and larger.
func TestDemandRepliesGrow(t *testing.T) {
	ram := openRAM(t, Block{ID: "ram", Path: ramFile(t, 2<<20, pattern).Name(), Size: 2 << 20, PageSize: 4096})
	for _, c := range []struct {
		name string
		cost float64 // of a byte on the link, in ns
		ask  uint32
		want []int
	}{
		{"1 Gbit/s", 8, 256 << 10, []int{16 << 10, 32 << 10, 64 << 10, 128 << 10, 16 << 10}},
		{"10 Gbit/s", 0.8, 256 << 10, []int{120 << 10, 136 << 10}},
		{"nothing is known", 0, 256 << 10, []int{192 << 10, 64 << 10}},
		{"one page", 8, 4096, []int{4096}},
		{"more than a reply", 8, 1 << 20, []int{16 << 10, 32 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10, 16 << 10}},
	} {
		t.Run(c.name, func(t *testing.T) {
			e, lane := offer(t, ram)
			e.link.ps.Store(int64(1000 * c.cost))
			for range 2 { // the second request begins with a small reply, too
				got := repliesTo(t, lane, pagewire.Request{Ranges: []pagewire.Range{{Length: c.ask}}})
				if !slices.Equal(got, c.want) {
					t.Fatalf("replies of %d bytes, want %d", got, c.want)
				}
			}
		})
	}
}

// TestServingDoesNotFillHoles: serving holes must not allocate pages of the source's RAM file, because the host may be
// short of memory.
func TestServingDoesNotFillHoles(t *testing.T) {
	const size = 16 << 20
	f := ramFile(t, size, func(page int64) []byte {
		if page%512 != 0 {
			return nil
		}
		return pattern(page)
	})
	before := allocated(t, f)
	_, lane := offer(t, openRAM(t, Block{ID: "ram", Path: f.Name(), Size: size, PageSize: 4096}))
	nothing := func(pagewire.Run, []byte) {}
	for at := uint64(0); at < size; at += 64 << 10 {
		if err := lane.fetch([]pagewire.Range{
			{Offset: at, Length: 4096}, {Offset: at, Length: 64 << 10},
		}, nothing); err != nil {
			t.Fatal(err)
		}
	}
	if after := allocated(t, f); after != before {
		t.Fatalf("the file grew from %d to %d blocks", before, after)
	}
}

func allocated(t *testing.T, f *os.File) int64 {
	t.Helper()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return info.Sys().(*syscall.Stat_t).Blocks
}

func TestStatsCountEachLane(t *testing.T) {
	f := ramFile(t, 1<<20, func(page int64) []byte {
		if page < 3 {
			return pattern(page)
		}
		return nil
	})
	s := NewServer(Options{})
	e, err := s.Offer(
		testID, testToken, openRAM(t, Block{ID: "ram", Path: f.Name(), Size: 1 << 20, PageSize: 4096}), isStopped,
	)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Withdraw()
	conn := serve(t, s)
	first, second := openLane(t, conn, testID, testToken), openLane(t, conn, testID, testToken)
	nothing := func(pagewire.Run, []byte) {}
	if err := first.fetch([]pagewire.Range{{Length: 2 * 4096}, {Offset: 8 * 4096, Length: 4096}}, nothing); err != nil {
		t.Fatal(err)
	}
	if err := second.fetch([]pagewire.Range{{Length: 1 << 20}}, nothing); err != nil {
		t.Fatal(err)
	}
	want := Stats{
		Lanes: 2, Requests: 2, Replies: 2,
		Pages: 3 + 256, ZeroPages: 1 + 253, PageBytes: 5 * 4096, Bytes: 5 * 4096,
	}
	if got := e.Stats(); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	pages := map[uint64]bool{}
	for _, l := range e.Lanes() {
		pages[l.Pages] = true
	}
	if fmt.Sprint(pages) != "map[3:true 256:true]" {
		t.Errorf("pages of the lanes: %v", pages)
	}
	// The counters of a lane stay in the sums when it has ended.
	if err := second.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if err := second.RecvMsg(&pagewire.Reply{}); err == nil {
		t.Fatal("a reply without a request")
	}
	eventually(t, "the lane to be closed", func() bool { return e.Stats().Lanes == 1 })
	want.Lanes = 1
	if got := e.Stats(); got != want {
		t.Errorf("after one lane ended: got %+v, want %+v", got, want)
	}
}
