// SPDX-License-Identifier: Apache-2.0

package main

import (
	"slices"
	"sync"
	"time"

	"github.com/migrated-vm/migrated/e2e/lab"
)

// How the wire is sampled. A sweep has a rate when it keeps that rate for useSpan.
const (
	useEvery = 25 * time.Millisecond
	useSpan  = 250 * time.Millisecond
	// usedWell is the part of the link that a sweep should use.
	usedWell = 0.9
)

// A carried is how much a wire had carried at a moment.
type carried struct {
	at    time.Time
	bytes int64
}

// A wireWatch samples the wire from source to destination during a move. It changes the path if the network says so.
type wireWatch struct {
	wires    []*lab.Wire // both, the watched one first
	network  network
	changed  time.Time // when the path changed; zero: it has not
	seen     []carried
	switched chan struct{}
	stop     chan struct{}
	once     sync.Once // of end
	done     sync.WaitGroup
}

// watchWire begins to sample. It returns nil if the network has no link.
func (s *scene) watchWire(from *lab.Host) *wireWatch {
	if s.bench.network.link == nil {
		return nil
	}
	w := &wireWatch{
		wires: []*lab.Wire{s.lab.AB, s.lab.BA}, network: s.bench.network,
		switched: make(chan struct{}), stop: make(chan struct{}),
	}
	if from == s.lab.B {
		slices.Reverse(w.wires)
	}
	w.done.Go(w.run)
	return w
}

// runs tells the watch that the VM runs at the destination.
func (w *wireWatch) runs() {
	if w != nil {
		close(w.switched)
	}
}

// end ends the watch and restores the link. It may be called again.
func (w *wireWatch) end() {
	if w == nil {
		return
	}
	w.once.Do(func() {
		close(w.stop)
		w.done.Wait()
		w.set(w.network.link)
	})
}

func (w *wireWatch) set(link *lab.Link) {
	for _, wire := range w.wires {
		wire.Set(*link)
	}
}

func (w *wireWatch) run() {
	ticks := time.NewTicker(useEvery)
	defer ticks.Stop()
	var change <-chan time.Time // never, until the VM runs
	switched := w.switched
	for {
		select {
		case <-ticks.C:
			w.seen = append(w.seen, carried{time.Now(), w.wires[0].Stats().Bytes})
		case <-switched:
			switched = nil
			if w.network.becomes != nil {
				change = time.After(pathAfter)
			}
		case <-change:
			w.set(w.network.becomes)
			w.changed = time.Now()
		case <-w.stop:
			return
		}
	}
}

// ofWire fills in how much of the link the move has used, from the switch until all memory was there. If the path
// changes, it counts from the change on.
func (f *figures) ofWire(w *wireWatch, resumed, ended time.Time) {
	if w == nil {
		return
	}
	begin, rate := resumed, w.network.link.Rate
	if w.network.becomes != nil {
		if w.changed.IsZero() || w.changed.After(ended) {
			return // all memory was there before the change
		}
		begin, rate = w.changed, w.network.becomes.Rate
	}
	f.LinkUse = use(w.seen, begin, ended, rate)
	f.LinkSteady = steadyUse(w.seen, begin, ended, rate)
	f.UsedWellAfter = usedWellAfter(w.seen, begin, ended, rate)
}

// use returns the part of the rate, in bits a second, that was used between two moments.
func use(seen []carried, begin, end time.Time, rate int64) float64 {
	within := between(seen, begin, end)
	if len(within) < 2 {
		return 0
	}
	return partUsed(within[0], within[len(within)-1], rate)
}

func between(seen []carried, begin, end time.Time) (within []carried) {
	for _, c := range seen {
		if !c.at.Before(begin) && !c.at.After(end) {
			within = append(within, c)
		}
	}
	return within
}

func partUsed(from, to carried, rate int64) float64 {
	return float64(to.bytes-from.bytes) * 8 / to.at.Sub(from.at).Seconds() / float64(rate)
}

// steadyUse returns the median of the parts that were used in each useSpan.
func steadyUse(seen []carried, begin, end time.Time, rate int64) float64 {
	var parts []float64
	for _, span := range spans(between(seen, begin, end)) {
		parts = append(parts, partUsed(span[0], span[1], rate))
	}
	if len(parts) == 0 {
		return 0
	}
	return median(parts)
}

// spans returns the first and the last sample of each useSpan. One begins at each sample.
func spans(within []carried) (all [][2]carried) {
	for i := range within {
		for _, last := range within[i+1:] {
			if last.at.Sub(within[i].at) >= useSpan {
				all = append(all, [2]carried{within[i], last})
				break
			}
		}
	}
	return all
}

// usedWellAfter returns how long it took from begin until a useSpan used usedWell of the link. If none did, it is all
// the time that the move took.
func usedWellAfter(seen []carried, begin, end time.Time, rate int64) time.Duration {
	for _, span := range spans(between(seen, begin, end)) {
		if partUsed(span[0], span[1], rate) >= usedWell {
			return span[0].at.Sub(begin)
		}
	}
	return end.Sub(begin)
}
