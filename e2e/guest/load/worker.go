// SPDX-License-Identifier: Apache-2.0

package load

import (
	"sync/atomic"
	"time"

	"github.com/migrated-vm/migrated/e2e/guest/pace"
	"github.com/migrated-vm/migrated/e2e/guest/stamp"
)

// worker owns pages [from, to) and their table entries. No other thread touches them, so a difference is damage and
// never a race.
type worker struct {
	load     *Load
	from, to uint32
	working  uint32 // size of the working set, the first pages of its own
	random   uint64 // xorshift64 state
	cursor   uint32 // of Sequential and Stride
	sum      uint64 // of the generations in [from, to), see stamp.Table

	// Written by the worker, read by the reporter.
	totalOps, totalWrites, corruptions atomic.Uint64
	slowest                            pace.Slowest
	began                              atomic.Int64 // when the running operation began; 0: none runs
	latencies                          histogram

	tasks chan task
}

// task is work for a worker between operations, on its own pages.
type task struct {
	run  func(*worker)
	done chan<- struct{}
}

// run is the worker's thread.
func (w *worker) run() {
	var next time.Duration // when the next operation is due, with a rate
	last := w.load.now()
	for {
		if !w.load.running.Load() || w.load.config.Pattern == Idle {
			w.do(<-w.tasks)
			last = w.load.now()
			next = last
			continue
		}
		select {
		case t := <-w.tasks:
			w.do(t)
			last = w.load.now()
			next = last
		default:
		}
		if interval := w.load.interval; interval > 0 {
			if wait := next - w.load.now(); wait > 0 {
				time.Sleep(wait)
			}
			last = w.load.now()
			next = max(next, last-pace.MaxBehind) + interval
		}
		// Without a rate an operation begins where the one before it ended, so that no stall falls between two operations.
		w.began.Store(int64(last))
		w.visit(w.pick())
		end := w.load.now()
		w.began.Store(0)
		w.record(end - last)
		last = end
	}
}

func (w *worker) do(t task) {
	t.run(w)
	t.done <- struct{}{}
}

func (w *worker) record(took time.Duration) {
	w.latencies.add(int64(took))
	w.totalOps.Add(1)
	w.slowest.Note(took)
}

func (w *worker) draw() uint64 {
	w.random ^= w.random << 13
	w.random ^= w.random >> 7
	w.random ^= w.random << 17
	return w.random
}

// pick chooses the next page of the working set.
func (w *worker) pick() uint32 {
	switch w.load.config.Pattern {
	case Sequential:
		w.cursor++
	case Stride:
		w.cursor += strideStep
		if w.cursor >= w.working {
			w.cursor = (w.cursor%strideStep + 1) % strideStep // the next lane
		}
	default:
		return w.from + uint32(w.draw()>>32*uint64(w.working)>>32)
	}
	w.cursor %= w.working
	return w.from + w.cursor
}

// visit checks one page completely and, with the configured probability, writes its next generation.
func (w *worker) visit(index uint32) {
	generation, ok := w.load.table.Get(index)
	if !ok {
		generation = w.repairEntry(index)
	}
	p, fill := &w.load.pages[index], w.load.config.Fill
	if first := p.Check(fill, index, generation); first >= 0 {
		w.report(p.Explain(fill, index, generation, first))
		p.Write(fill, index, generation) // so that it is counted once
		return
	}
	if w.draw()%100 < uint64(w.load.config.WritePercent) {
		p.Write(fill, index, generation+1)
		w.load.table.Set(index, generation+1)
		w.sum++
		w.totalWrites.Add(1)
	}
}

// check verifies all pages of the worker, in the working set or not, and the sum over their table entries. It returns
// how much damage it found.
func (w *worker) check() uint64 {
	before := w.corruptions.Load()
	for i := w.from; i < w.to; i++ {
		generation, ok := w.load.table.Get(i)
		if !ok {
			generation = w.repairEntry(i)
		}
		p, fill := &w.load.pages[i], w.load.config.Fill
		if first := p.Check(fill, i, generation); first >= 0 {
			w.report(p.Explain(fill, i, generation, first))
			p.Write(fill, i, generation)
		}
	}
	if sum := w.load.table.Sum(w.from, w.to); sum != w.sum {
		w.report(stamp.Damage{Page: w.from, Word: -1, Expected: w.sum, Got: sum, Kind: stamp.BadTable})
		w.sum = sum
	}
	return w.corruptions.Load() - before
}

// repairEntry reports a damaged table entry and stamps its page anew, because the page's proper content is no longer
// known.
func (w *worker) repairEntry(index uint32) uint32 {
	w.report(stamp.Damage{Page: index, Word: -1, Got: w.load.table[index], Kind: stamp.BadTable})
	w.load.pages[index].Write(w.load.config.Fill, index, firstGeneration)
	w.load.table.Set(index, firstGeneration)
	w.sum = w.load.table.Sum(w.from, w.to)
	return firstGeneration
}

func (w *worker) report(d stamp.Damage) {
	w.load.report(&w.corruptions, d)
}

// stampAll writes the first generation of all the worker's pages.
func (w *worker) stampAll() {
	for i := w.from; i < w.to; i++ {
		w.load.pages[i].Write(w.load.config.Fill, i, firstGeneration)
		w.load.table.Set(i, firstGeneration)
	}
	w.sum = uint64(w.to-w.from) * firstGeneration
}
