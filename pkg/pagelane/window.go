// SPDX-License-Identifier: Apache-2.0

package pagelane

import "sync/atomic"

// sendWindow is how much the peer takes: the flow control of HTTP/2 (RFC 9113, 5.2). The reader opens it, as the peer
// says, and the sender takes from it. All sizes are in bytes.
type sendWindow struct {
	frame   atomic.Int64 // the largest frame
	stream  atomic.Int64 // how much more may be sent on the stream,
	conn    atomic.Int64 // and on the connection
	initial int64        // how much that is of a new stream; owned by the reader

	// opened holds one item when the reader has opened the window since the sender looked last. It is nil where the sender
	// is the reader.
	opened chan struct{}
}

// init sets what HTTP/2 begins with.
func (w *sendWindow) init() {
	w.initial = firstWindow
	w.frame.Store(defaultFrame)
	w.stream.Store(firstWindow)
	w.conn.Store(firstWindow)
}

// take takes what one frame may have, at most n bytes. It returns 0 while the window is closed.
func (w *sendWindow) take(n int) int {
	k := min(int64(n), w.frame.Load(), w.stream.Load(), w.conn.Load())
	if k <= 0 {
		return 0
	}
	w.stream.Add(-k)
	w.conn.Add(-k)
	return int(k)
}

// open adds to the window of a stream, or to that of the connection if id is 0. A peer that exceeds the limit of HTTP/2
// harms only itself.
func (w *sendWindow) open(id uint32, n int64) {
	if id == stream {
		w.stream.Add(n)
	} else {
		w.conn.Add(n)
	}
	w.wake()
}

// resize changes the initial window of streams, and that of the open stream by as much (RFC 9113, 6.9.2).
func (w *sendWindow) resize(initial int64) {
	w.stream.Add(initial - w.initial)
	w.initial = initial
	w.wake()
}

// wake wakes the sender if it waits, and otherwise has it look once more before it waits.
func (w *sendWindow) wake() {
	select {
	case w.opened <- struct{}{}:
	default: // the sender was told already, or is the caller
	}
}
