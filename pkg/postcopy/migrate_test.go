// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"context"
	"math/rand/v2"
	"testing"

	"github.com/migrated-vm/migrated/pkg/pagewire"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

// TestMigrate fills shared and private memory while threads read everywhere, and compares every byte.
func TestMigrate(t *testing.T) {
	for name, l := range map[string]layout{
		"tmpfs":     {{kind: uffdtest.Shmem, pages: 4096 + 5}},
		"two":       {{kind: uffdtest.Shmem, pages: 700}, {kind: uffdtest.Shmem, pages: 3}},
		"hugetlbfs": {{kind: uffdtest.Hugetlb, pages: 12}},
		"several descriptors": {
			{kind: uffdtest.Shmem, pages: 300}, {kind: uffdtest.Shmem, pages: 200, own: true},
			{kind: uffdtest.Shmem, pages: 100}, {kind: uffdtest.Shmem, pages: 400, own: true},
		},
		"mixed": {{kind: uffdtest.Shmem, pages: 300}, {kind: uffdtest.Hugetlb, pages: 5}, {kind: uffdtest.Shmem, pages: 1}},
	} {
		t.Run(name, func(t *testing.T) {
			uffdtest.CheckDescriptors(t)
			g := newTarget(t, l, Options{})
			result := g.run(context.Background(), dial(t, realSource(t, l), defaultWorkers))
			g.touch(rand.New(rand.NewPCG(1, 2)), 200) // faults come before the sweep may begin
			if s := g.Stats(); s.Faults == 0 || s.BulkPages != 0 || s.DemandPages == 0 {
				t.Errorf("before the sweep: %+v", s)
			}
			g.StartSweep()
			g.touch(rand.New(rand.NewPCG(3, 4)), 300)
			if err := await(t, "end of Run", result); err != nil {
				t.Fatal(err)
			}
			await(t, "Done", g.Done())
			g.verify()
			s := g.Stats()
			if s.PagesPresent != s.PagesTotal || s.LastPage.IsZero() || s.FaultMax == 0 || s.FaultP50 > s.FaultMax {
				t.Errorf("at the end: %+v", s)
			}
		})
	}
}

// TestPackedPages: packed pages are installed with their content, and counted as they came.
func TestPackedPages(t *testing.T) {
	const pages = 16
	g, _, bulk, run := startSilent(t, pages, Options{})
	g.StartSweep()
	result := run(context.Background())
	bulk.asked(t)
	want := uint64(0)
	for half, c := range []pagewire.Compression{pagewire.S2, pagewire.Zstd} {
		const size = pages / 2 * pageSize
		reply := pagewire.Reply{Runs: []pagewire.Run{{Offset: uint64(half * size), Length: size}}}
		reply.Lease(size)
		for p := range uint64(pages / 2) { // one page of these is zero, which makes the reply shorter when packed
			fill(reply.Data[p*pageSize:][:pageSize], 0, uint64(half)*pages/2+p)
		}
		if packed := reply.Pack(c, size-pageSize/2); reply.Compression() != c {
			t.Fatalf("%v makes %d bytes of %d", c, packed, size)
		}
		want += uint64(reply.Carried())
		if err := bulk.stream.Send(&reply); err != nil {
			t.Fatal(err)
		}
	}
	mustEnd(t, result)
	g.verify()
	if s := g.Stats(); s.BytesReceived != want || s.PageBytes != pages*pageSize {
		t.Errorf("%d bytes received for %d of pages, want %d for %d", s.BytesReceived, s.PageBytes, want, pages*pageSize)
	}
}

// touch has eight threads at a time read random words.
func (g *target) touch(random *rand.Rand, times int) {
	g.t.Helper()
	type touched struct {
		pending uffdtest.Pending
		want    uint64
	}
	var under []touched
	for n := range times {
		i := random.IntN(len(g.blocks))
		page, offset := random.Uint64N(g.blocks[i].Size/g.blocks[i].PageSize), random.Uint64N(g.blocks[i].PageSize/8)*8
		under = append(under, touched{g.read(i, page, offset), word(i, page, offset)})
		if len(under) < 8 && n < times-1 {
			continue
		}
		for _, u := range under {
			if v := u.pending.JoinOK(); v != u.want {
				g.t.Fatalf("a thread read %#x, want %#x", v, u.want)
			}
		}
		under = under[:0]
	}
}
