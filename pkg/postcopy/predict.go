// SPDX-License-Identifier: Apache-2.0

package postcopy

import "sync/atomic"

// predictor learns in which order each thread touches pages, and says which ones it will want next.
//
// A fault tells two things: where the thread is, and which pages it has passed since its last fault, because they were
// asked for ahead of it and came in time. So the engine sees whether guesses are useful: after a right one, the next
// fault of the stream is behind the pages that were asked for, or on one that is still on its way.
//
//	faults of one thread:   p   p+s  p+2s                              p+7s
//	learnt:                 -   s?   s: ask for p+3s … p+6s            right: ask for twice as many
//
// A thread has several streams, because a vCPU runs several programs and a program copies from one place to another. A
// stream that is wrong is forgotten, so for a guest without any order nothing is asked for ahead.
//
// A thread's faults come one after the other, so its entry is not contended for, although different workers read them.
// Where two threads share an entry, they disturb each other's guesses and nothing else. In any case each page is
// claimed before it is asked for, and crosses the network once.
type predictor struct {
	threads [predictThreads]threadStreams
	// Pages that were guessed, and those of them that streams have passed.
	guessed, right atomic.Uint64
}

// threadStreams are the streams of one thread.
type threadStreams struct {
	streams [predictStreams]stream
	victim  atomic.Uint32 // counts up: the stream to be replaced next
}

// stream is what a thread does, in global page numbers. All zero: nothing.
type stream struct {
	last  atomic.Uint64 // page of the last fault in it, + 1
	step  atomic.Int64  // pages from one touch to the next, 0: not known
	depth atomic.Int64  // how many pages behind last were asked for
}

// guess is what a thread will want: count pages, step apart, the first of them at page first.
type guess struct {
	first uint64
	step  int64
	count int64
}

// fault learns from a fault of a thread on page p, and says what to ask for. No more than most pages are then asked for
// ahead of the thread.
func (t *predictor) fault(thread uint32, p uint64, most int64) guess {
	streams := &t.threads[thread%predictThreads]
	for i := range streams.streams {
		s := &streams.streams[i]
		step, depth := s.step.Load(), s.depth.Load()
		passed, ok := s.passed(p, step, depth)
		if !ok {
			continue
		}
		t.right.Add(uint64(min(passed, depth)))
		before := max(0, depth-passed) // pages that were asked for and that the thread has still before it
		depth = min(max(firstDepth, 2*depth), most)
		if t.guessed.Load() > 2*t.right.Load()+trial {
			depth = min(firstDepth, most) // streams here end too soon
		}
		s.last.Store(p + 1)
		s.depth.Store(max(depth, before))
		count := max(0, depth-before)
		t.guessed.Add(uint64(count))
		return guess{p + uint64(step*(before+1)), step, count}
	}
	streams.learn(p)
	return guess{}
}

// passed says how many steps a thread that faults on page p has gone on in the stream, and whether p belongs to the
// stream. It does if it is among the pages that were asked for, next behind them, or a little further on, because the
// sweep or another thread has brought some.
func (s *stream) passed(p uint64, step, depth int64) (int64, bool) {
	last := s.last.Load()
	if last == 0 || step == 0 {
		return 0, false
	}
	distance := int64(p) - int64(last-1)
	steps := distance / step
	return steps, distance%step == 0 && steps >= 1 && steps <= depth+1+skipped
}

// learn takes the fault as the second one of a stream whose first fault is near, or as the first one of a new stream.
func (t *threadStreams) learn(p uint64) {
	for i := range t.streams {
		s := &t.streams[i]
		last := s.last.Load()
		if last == 0 {
			continue
		}
		if step := int64(p) - int64(last-1); step != 0 && step >= -farthest && step <= farthest {
			s.step.Store(step)
			s.depth.Store(0)
			s.last.Store(p + 1)
			return
		}
	}
	s := &t.streams[t.victim.Add(1)%predictStreams]
	s.step.Store(0)
	s.depth.Store(0)
	s.last.Store(p + 1)
}

// hits is the share of guessed pages that were right, 0 if there were none.
func (t *predictor) hits() float64 {
	guessed := t.guessed.Load()
	if guessed == 0 {
		return 0
	}
	return float64(t.right.Load()) / float64(guessed)
}
