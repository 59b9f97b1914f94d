// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"sync/atomic"
	"time"
)

const (
	// logLines may wait to be written, some hundred bytes each.
	logLines = 1024
	// logGrace is how long the last of them may take when the daemon ends.
	logGrace = time.Second
)

// A logQueue writes a log by a goroutine of its own. A log that takes nothing, for a disk that is full or a journal that
// hangs, must not keep a VM waiting that stands still: what does not fit into the queue is dropped, and how much that
// was stands in the log once it takes lines again.
type logQueue struct {
	lines   chan []byte
	dropped atomic.Uint64
	written chan struct{} // closed when all have been
}

func newLogQueue(to io.Writer) *logQueue {
	q := &logQueue{lines: make(chan []byte, logLines), written: make(chan struct{})}
	go func() {
		defer close(q.written)
		for line := range q.lines {
			_, _ = to.Write(line) // there is no other place to say that it failed
			if n := q.dropped.Swap(0); n > 0 {
				_, _ = fmt.Fprintf(to, "%d lines of the log were dropped here: it took none\n", n)
			}
		}
	}()
	return q
}

// Write takes one line, as slog's handlers write them. It never waits and never fails.
func (q *logQueue) Write(line []byte) (int, error) {
	select {
	case q.lines <- append([]byte(nil), line...):
	default:
		q.dropped.Add(1)
	}
	return len(line), nil
}

// Close has the rest written, if the log takes it. Nothing may be written afterwards.
func (q *logQueue) Close() {
	close(q.lines)
	select {
	case <-q.written:
	case <-time.After(logGrace):
	}
}
