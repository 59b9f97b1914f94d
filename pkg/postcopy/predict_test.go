// SPDX-License-Identifier: Apache-2.0

package postcopy

import (
	"context"
	"math/rand/v2"
	"testing"

	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

// walker is a thread that touches pages in some order. A touch is a fault unless the page was prefetched.
type walker struct {
	t       *predictor
	thread  uint32
	here    map[uint64]bool
	touches int
	faults  int
	deepest int64
	most    int64
}

func newWalker(t *predictor, thread uint32) *walker {
	return &walker{t: t, thread: thread, here: map[uint64]bool{}, most: 32}
}

func (w *walker) touch(p uint64) {
	w.touches++
	if w.here[p] {
		return
	}
	w.faults++
	w.here[p] = true
	g := w.t.fault(w.thread, p, w.most)
	w.deepest = max(w.deepest, g.count)
	for i := range g.count {
		w.here[g.first+uint64(i*g.step)] = true
	}
}

func TestPredictFollowsAStride(t *testing.T) {
	for _, step := range []int64{1, 17, -1, -3, 64} {
		var table predictor
		w := newWalker(&table, 7)
		for i := range int64(1000) {
			w.touch(uint64(1_000_000 + i*step))
		}
		if w.faults > 1000/20 || w.deepest != w.most {
			t.Errorf("step %d: %d faults of %d touches, guesses of up to %d pages", step, w.faults, w.touches, w.deepest)
		}
		if hits := table.hits(); hits < 0.9 {
			t.Errorf("step %d: %.2f of the guesses were right", step, hits)
		}
	}
}

func TestPredictTellsThreadsAndStreamsApart(t *testing.T) {
	var table predictor
	a, b := newWalker(&table, 1), newWalker(&table, 2)
	for i := range uint64(1000) {
		a.touch(10_000 + i)    // reads what it copies,
		a.touch(900_000 + 2*i) // and writes it
		b.touch(500_000 - 5*i)
	}
	for _, w := range []*walker{a, b} {
		if w.faults > w.touches/15 {
			t.Errorf("thread %d: %d faults of %d touches", w.thread, w.faults, w.touches)
		}
	}
}

func TestPredictLeavesRandomAlone(t *testing.T) {
	var table predictor
	w := newWalker(&table, 1)
	random := rand.New(rand.NewPCG(1, 2))
	for range 20_000 {
		w.touch(random.Uint64N(80_000))
	}
	if guessed := table.guessed.Load(); guessed > uint64(w.touches)/100 {
		t.Errorf("%d pages were asked for ahead of %d random touches", guessed, w.touches)
	}
}

func TestPredictGivesUpOnShortRuns(t *testing.T) {
	var table predictor
	w := newWalker(&table, 1)
	random := rand.New(rand.NewPCG(3, 4))
	guessedEarly := uint64(0)
	for i := range 4000 { // three pages in a row, at a random place each time
		start := random.Uint64N(1 << 40)
		for p := range uint64(3) {
			w.touch(start + p)
		}
		if i == 500 {
			guessedEarly = table.guessed.Load()
		}
	}
	if late := table.guessed.Load() - guessedEarly; late > 3500*firstDepth {
		t.Errorf("%d pages guessed for the last 3500 runs, none of them right (%.2f)", late, table.hits())
	}
}

// TestGuessesAreAskedForAndInstalled: a thread goes through memory from page to page. Pages are prefetched from a real
// source.
func TestGuessesAreAskedForAndInstalled(t *testing.T) {
	const pages = 4096
	l := layout{{kind: uffdtest.Shmem, pages: pages}}
	g := newTarget(t, l, Options{})
	g.started.Store(true) // as if the sweep had begun, which only then allows prefetching
	run := g.run(context.Background(), dial(t, realSource(t, l), g.workers))
	g.child.Do(uffdtest.Touch(g.blocks[0].all(), uffdtest.Shmem))
	s := g.Stats()
	if s.Guessed < pages*9/10 || s.Faults > pages/2 || s.GuessHits < 0.9 {
		t.Errorf("%d pages touched: %d faults, %d pages asked for ahead, %.2f right", pages, s.Faults, s.Guessed, s.GuessHits)
	}
	close(g.sweeping)
	mustEnd(t, run)
	g.verify()
}
