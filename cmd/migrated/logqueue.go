// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"sync/atomic"
	"time"
)

const (
	// logLines is how many lines may wait to be written. A line has a few hundred bytes.
	logLines = 1024
	// logGrace is how long writing the last lines may take when the daemon ends.
	logGrace = time.Second
)

// A logQueue writes a log in a goroutine of its own, so that a VM never waits for a log that blocks, because a disk is
// full or a journal hangs. Lines that do not fit into the queue are dropped. Their number is logged once the log takes
// lines again.
type logQueue struct {
	lines   chan []byte
	dropped atomic.Uint64
	written chan struct{} // closed when all lines have been written
}

func newLogQueue(to io.Writer) *logQueue {
	q := &logQueue{lines: make(chan []byte, logLines), written: make(chan struct{})}
	go func() {
		defer close(q.written)
		for line := range q.lines {
			_, _ = to.Write(line) // there is no other place to report an error
			if n := q.dropped.Swap(0); n > 0 {
				_, _ = fmt.Fprintf(to, "%d lines of the log were dropped here: it was blocked\n", n)
			}
		}
	}()
	return q
}

// Write queues one line, as slog's handlers write them. It never waits and never fails.
func (q *logQueue) Write(line []byte) (int, error) {
	select {
	case q.lines <- append([]byte(nil), line...):
	default:
		q.dropped.Add(1)
	}
	return len(line), nil
}

// Close waits until the queued lines are written, at most logGrace. Write must not be called afterwards.
func (q *logQueue) Close() {
	close(q.lines)
	select {
	case <-q.written:
	case <-time.After(logGrace):
	}
}
