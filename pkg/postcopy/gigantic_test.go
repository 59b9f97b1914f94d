// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"context"
	"math/rand/v2"
	"testing"

	"github.com/migrated-vm/migrated/pkg/pagewire"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

// inParts has huge pages of 2 MiB come in parts, as those of 1 GiB do.
func inParts(t *testing.T, size uint64) {
	t.Helper()
	before := partSize
	partSize = size
	t.Cleanup(func() { partSize = before })
}

// TestGiganticPages: pages that are too large for a message come in parts, and are installed whole.
func TestGiganticPages(t *testing.T) {
	inParts(t, 256<<10)
	l := layout{{kind: uffdtest.Shmem, pages: 300}, {kind: uffdtest.Hugetlb, pages: 12}}
	for _, populated := range []bool{false, true} {
		g := newTarget(t, l, Options{})
		g.blocks[1].Populated = populated
		result := g.run(context.Background(), dial(t, realSource(t, l), defaultWorkers))
		g.touch(rand.New(rand.NewPCG(1, 2)), 20) // faults come before the sweep may begin
		if s := g.Stats(); s.Faults == 0 || s.BulkPages != 0 || s.PagesTotal != 300+12*8 {
			t.Errorf("before the sweep: %+v", s)
		}
		g.StartSweep()
		g.touch(rand.New(rand.NewPCG(3, 4)), 50)
		if err := await(t, "end of Run", result); err != nil {
			t.Fatal(err)
		}
		g.verify()
		if s := g.Stats(); s.PagesPresent != s.PagesTotal {
			t.Errorf("at the end: %+v", s)
		}
	}
}

// sendPart sends one part of the first page of block 0.
func (l *scriptedLane) sendPart(t *testing.T, n, size, pageSize uint64) {
	t.Helper()
	page := make([]byte, pageSize)
	fill(page, 0, 0)
	r := pagewire.Reply{Runs: []pagewire.Run{{Offset: n * size, Length: uint32(size)}}, Data: page[n*size:][:size]}
	if err := l.stream.Send(&r); err != nil {
		t.Fatal(err)
	}
}

// TestGiganticPageWaitsForItsParts: a thread waits until the last part of its page has come. All parts are requested at
// once. A part that came in one session is not requested in the next one.
func TestGiganticPageWaitsForItsParts(t *testing.T) {
	const part, parts = 512 << 10, 4
	inParts(t, part)
	g := newTarget(t, layout{{kind: uffdtest.Hugetlb, pages: 1}}, Options{Workers: 1})
	l, theirs := scripted(t, 1)
	ctx, stop := context.WithCancel(context.Background())
	result := g.run(ctx, l)
	thread := g.read(0, 0, 3*part)
	if r := theirs[0].asked(t); r != (pagewire.Range{Length: parts * part}) {
		t.Fatalf("asked for %v", r)
	}
	for n := range uint64(parts - 1) {
		theirs[0].sendPart(t, n, part, parts*part)
	}
	until(t, "three parts here", func() bool { return g.pages.get(parts-2) == installing })
	thread.WaitWaiting()
	if thread.Ended() || g.pages.get(parts-1) != demanded {
		t.Fatalf("the last part is in state %d", g.pages.get(parts-1))
	}
	stop()
	if err := await(t, "end of Run", result); err == nil {
		t.Fatal("the page is said to be here")
	}
	l, theirs = scripted(t, 1)
	result = g.run(context.Background(), l)
	if r := theirs[0].asked(t); r != (pagewire.Range{Offset: (parts - 1) * part, Length: part}) {
		t.Fatalf("the next session asks for %v", r)
	}
	theirs[0].sendPart(t, parts-1, part, parts*part)
	expect(t, thread, word(0, 0, 3*part))
	mustEnd(t, result)
	g.verify()
}

// TestWorkerCopiesGiganticPageWithItsOwnRecord: a fault installs a page of which all parts came as zeros before. The
// worker does not use the record of its lane meanwhile, because the lane's receiver may be copying.
func TestWorkerCopiesGiganticPageWithItsOwnRecord(t *testing.T) {
	const part, parts = 512 << 10, 4
	inParts(t, part)
	g := newTarget(t, layout{{kind: uffdtest.Hugetlb, pages: 2}}, Options{Workers: 1})
	if n := g.pages.claimSweep(0, parts); n != parts {
		t.Fatalf("%d parts are claimed", n)
	}
	for p := range uint64(parts) {
		g.pages.arriveZero(p)
	}
	l, _ := scripted(t, 1)
	ctx, stop := context.WithCancel(context.Background())
	result := g.run(ctx, l)
	expect(t, g.read(0, 0, 0), 0)
	if dst, n, _ := g.wholeCopy().Answer(); dst != g.blocks[0].Addr || n != parts*part {
		t.Errorf("the worker's record has %d bytes at %#x", n, dst)
	}
	if dst, _, _ := g.copies[0].Answer(); dst != 0 {
		t.Errorf("the lane's record has %#x", dst)
	}
	stop()
	if err := await(t, "end of Run", result); err == nil {
		t.Error("the second page is said to be here")
	}
}

// TestCloseFreesPartsOfGiganticPages: a page of which only some parts came is put together in memory of the engine's.
// Close frees it.
func TestCloseFreesPartsOfGiganticPages(t *testing.T) {
	const part, parts = 512 << 10, 4
	inParts(t, part)
	g := newTarget(t, layout{{kind: uffdtest.Hugetlb, pages: 1}}, Options{Workers: 1})
	l, theirs := scripted(t, 1)
	ctx, stop := context.WithCancel(context.Background())
	result := g.run(ctx, l)
	g.read(0, 0, 0)
	theirs[0].asked(t)
	theirs[0].sendPart(t, 0, part, parts*part)
	until(t, "a part here", func() bool { return g.pages.get(0) == installing })
	stop()
	if err := await(t, "end of Run", result); err == nil {
		t.Fatal("the page is said to be here")
	}
	if memory := g.blocks[0].gigantic[0].memory; len(memory) != parts*part {
		t.Fatalf("%d bytes of memory", len(memory))
	}
	for range 2 {
		if err := g.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if g.blocks[0].gigantic[0].memory != nil {
		t.Error("the memory stays")
	}
}
