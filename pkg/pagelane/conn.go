// SPDX-License-Identifier: Apache-2.0

package pagelane

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// conn is one side of the call. One goroutine at a time sends, and one at a time reads; it may be the same one.
//
//	sender                                         reader
//	1 Send encodes a message                       1 Recv decodes a message
//	2 └ send: frame by frame (send.go)             2 └ message: its length, then its bytes (receive.go)
//	3   ├ reserve: take from the sendWindow        3   └ fill: from what is read already, else
//	4   │ └ side.awaitWindow, while it is closed   4     ├ read: from the DATA frame, or, at its end,
//	5   └ Write                                    5     ├ next: another frame
//	                                               6     │ └ handle: open the sendWindow, answer a PING, count an ACK,
//	                                                     │           or side.headers
//	                                               7     └ credit: tell the peer that it may send more
//
// Each frame is one Write, which net.Conn keeps in one piece. So the reader can answer in steps 6 and 7 while the
// sender is in step 5.
type conn struct {
	net.Conn
	side side

	// Owned by the reader.
	in       *bufio.Reader
	expecter expecter      // the connection that in reads from, if it is an expecter
	control  *http2.Framer // reads all but DATA, and answers
	left     int           // bytes of the current DATA frame that were not read yet
	padding  int           // bytes that follow them
	ahead    []byte        // messages that were read while the sendWindow was waited for
	consumed int           // bytes that were read and not yet given back to the peer's windows
	window   int           // the size to which these windows were opened
	over     error         // why there will be no more data
	buffer   []byte        // the message that was read last; reused
	prefix   [prefix]byte

	// Signs of life of the peer, counted by the reader.
	received atomic.Uint64 // bytes of DATA
	acks     atomic.Uint64 // PINGs that were answered

	sendWindow sendWindow
	// patience limits how long the sender waits for a peer that neither opens its windows nor sends data. Such a peer has
	// stopped reading, even if it answers PINGs. 0: no limit.
	patience time.Duration
}

// side has the methods that differ between the two ends of a call. Client and Stream implement it.
type side interface {
	// headers handles a HEADERS frame. The reader calls it.
	headers(f *http2.MetaHeadersFrame) error
	// awaitWindow returns when the sendWindow may be open, or after a while. The sender calls it.
	awaitWindow() error
}

// expecter is a connection that reads with fewer system calls if it knows how much will come.
type expecter interface {
	// expect says that the peer is about to send n bytes, in addition to those that Read has returned.
	expect(n int)
}

// newConn returns one side of a call over c. Its caller sets the side.
func newConn(c net.Conn, in *bufio.Reader, window int) *conn {
	n := &conn{Conn: c, in: in, window: window, control: http2.NewFramer(c, in)}
	n.expecter, _ = c.(expecter)
	n.control.SetMaxReadFrameSize(maxControl)
	n.control.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	n.control.MaxHeaderListSize = maxControl
	n.sendWindow.init()
	return n
}

// broken ends the call because the peer breaks the rules.
func (c *conn) broken(format string, args ...any) error {
	c.over = fmt.Errorf("%w: "+format, append([]any{ErrBroken}, args...)...)
	return c.over
}

// lost returns why the call ended, if that is known, else err as a lost connection.
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
