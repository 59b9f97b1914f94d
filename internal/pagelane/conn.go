// SPDX-License-Identifier: Apache-2.0

package pagelane

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"sync/atomic"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// conn is one side of the call. One goroutine at a time reads, one at a time sends; each frame is one Write, which
// net.Conn keeps in one piece, so that the reader can answer what HTTP/2 wants answered meanwhile.
type conn struct {
	net.Conn

	// The reader's.
	in       *bufio.Reader
	control  *http2.Framer // reads all but DATA, and answers
	left     int           // bytes of the current DATA frame that were not read yet
	padding  int           // bytes that follow them
	ahead    []byte        // messages that were read while the window was waited for
	consumed int           // bytes that were read and that the peer's windows do not know of
	window   int           // what those were opened to
	initial  int64         // what the peer opened that of the stream to
	over     error         // why there will be no more data
	buffer   []byte        // the message that was read last; reused
	prefix   [prefix]byte
	headers  func(*http2.MetaHeadersFrame) error
	acked    func()    // a PING was answered
	heard    func(int) // so many bytes of DATA were read
	await    func(int) // sleeps until so many bytes have come, or some of them

	// What the peer takes: the reader writes, the sender reads.
	maxFrame     atomic.Int64
	streamWindow atomic.Int64
	connWindow   atomic.Int64
	awaitWindow  func() error // the sender calls it until there is some
	opened       func()       // the reader calls it when there is more
}

func newConn(c net.Conn, in *bufio.Reader, window int) *conn {
	n := &conn{Conn: c, in: in, window: window, initial: firstWindow, opened: func() {}, acked: func() {}, heard: func(int) {}}
	n.await = func(int) {}
	if s, ok := c.(*socket); ok { // TLS has records of its own
		n.await = s.await
	}
	n.control = http2.NewFramer(c, in)
	n.control.SetMaxReadFrameSize(maxControl)
	n.control.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	n.control.MaxHeaderListSize = maxControl
	n.maxFrame.Store(defaultFrame)
	n.streamWindow.Store(firstWindow)
	n.connWindow.Store(firstWindow)
	return n
}

// broken ends the call because the peer breaks the rules.
func (c *conn) broken(format string, args ...any) error {
	c.over = fmt.Errorf("%w: "+format, append([]any{ErrBroken}, args...)...)
	return c.over
}

// lost says that the connection is, unless it is known why.
func (c *conn) lost(err error) error {
	if c.over != nil && !errors.Is(c.over, io.EOF) {
		return c.over
	}
	return lost(err)
}

func lost(err error) error {
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return status.Errorf(codes.Unavailable, "the connection is lost: %v", err)
}
