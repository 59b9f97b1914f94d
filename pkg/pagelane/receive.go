// SPDX-License-Identifier: Apache-2.0

package pagelane

import (
	"encoding/binary"
	"errors"
	"io"

	"golang.org/x/net/http2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/pkg/pagelane/tcpkeepalive"
)

// message reads the next message, of at most most bytes. It is valid until the next call. At the end of the call,
// message returns io.EOF or the status that ended it.
func (c *conn) message(most int) ([]byte, error) {
	if err := c.fill(c.prefix[:], true); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint32(c.prefix[1:]))
	switch {
	case c.prefix[0] != 0:
		return nil, c.broken("a message is compressed by gRPC, which nobody announced")
	case n > most:
		return nil, c.broken("a message of %d bytes, at most %d are possible", n, most)
	}
	if cap(c.buffer) < n {
		c.buffer = make([]byte, max(n, 8<<10))
	}
	message := c.buffer[:n]
	return message, c.fill(message, false)
}

// fill reads the next bytes of the messages into p. The messages may end only where between is true.
func (c *conn) fill(p []byte, between bool) (err error) {
	for len(p) > 0 {
		var n int
		switch {
		case len(c.ahead) > 0:
			n = copy(p, c.ahead)
			c.ahead = c.ahead[n:]
		case c.left > 0:
			if n, err = c.read(p); err != nil {
				return err
			}
		case c.over == nil:
			if err := c.next(); err != nil {
				return err
			}
			continue
		case errors.Is(c.over, io.EOF) && !between:
			return c.broken("the call ends within a message")
		default:
			return c.over
		}
		if err := c.credit(n); err != nil {
			return err
		}
		p, between = p[n:], false
	}
	return nil
}

// read reads bytes of the current DATA frame, as many as are there and p takes.
func (c *conn) read(p []byte) (int, error) {
	p = p[:min(len(p), c.left)]
	if len(p) >= manyPackets && c.in.Buffered() == 0 && c.expecter != nil {
		c.expecter.expect(len(p))
	}
	n, err := c.in.Read(p)
	if err != nil {
		return 0, c.lost(err)
	}
	c.left -= n
	c.received.Add(uint64(n))
	return n, c.endData()
}

// endData passes over the padding, if the frame has been read up to there.
func (c *conn) endData() error {
	if c.left > 0 || c.padding == 0 {
		return nil
	}
	n, err := c.in.Discard(c.padding)
	if c.padding = 0; err != nil {
		return c.lost(err)
	}
	return c.credit(n)
}

// credit lets the peer send n bytes more before it has to wait. It tells the peer so only when enough bytes have
// gathered.
func (c *conn) credit(n int) error {
	if c.consumed += n; c.consumed < c.window/2 {
		return nil
	}
	more := uint32(c.consumed)
	c.consumed = 0
	return c.written(errors.Join(c.control.WriteWindowUpdate(0, more), c.control.WriteWindowUpdate(stream, more)))
}

// next reads one frame. Of DATA it reads the header.
func (c *conn) next() error {
	head, err := c.in.Peek(frameHeader)
	if err != nil {
		return c.lost(err)
	}
	length := int(head[0])<<16 | int(head[1])<<8 | int(head[2])
	kind, flags := http2.FrameType(head[3]), http2.Flags(head[4])
	if kind == http2.FrameData {
		if binary.BigEndian.Uint32(head[5:])&(1<<31-1) != stream {
			return c.broken("data of a stream that is none")
		}
		_, _ = c.in.Discard(frameHeader) // they were peeked at
		return c.data(length, flags)
	}
	frame, err := c.control.ReadFrame()
	if err != nil {
		var wrong http2.ConnectionError
		var wrongStream http2.StreamError
		if errors.As(err, &wrong) || errors.As(err, &wrongStream) || errors.Is(err, http2.ErrFrameTooLarge) {
			return c.broken("%v", err)
		}
		return c.lost(err)
	}
	return c.handle(frame)
}

// data begins a DATA frame.
func (c *conn) data(length int, flags http2.Flags) error {
	if c.over != nil {
		return c.broken("data after the end")
	}
	if c.left = length; flags.Has(http2.FlagDataPadded) {
		padding, err := c.in.ReadByte()
		if err != nil {
			return c.lost(err)
		}
		if int(padding) >= length {
			return c.broken("a frame of %d bytes with %d of padding", length, padding)
		}
		c.padding = int(padding)
		c.left -= 1 + c.padding
		if err := c.credit(1); err != nil {
			return err
		}
	}
	if flags.Has(http2.FlagDataEndStream) {
		c.over = io.EOF // the content of the frame is read first
	}
	return c.endData()
}

// handle deals with a frame that is not DATA.
func (c *conn) handle(frame http2.Frame) error {
	switch f := frame.(type) {
	case *http2.SettingsFrame:
		return c.settings(f)
	case *http2.WindowUpdateFrame:
		c.sendWindow.open(f.StreamID, int64(f.Increment))
	case *http2.PingFrame:
		if !f.IsAck() {
			return c.written(c.control.WritePing(true, f.Data))
		}
		c.acks.Add(1)
	case *http2.RSTStreamFrame:
		c.over = status.Errorf(codes.Unavailable, "the peer gave the call up: %v", f.ErrCode)
		return c.over
	case *http2.GoAwayFrame:
		if f.ErrCode == http2.ErrCodeEnhanceYourCalm { // grpc-go's default, if asked every tcpkeepalive.Quiet
			c.over = status.Errorf(codes.Unavailable,
				"the page server closed the lane because of keepalive PINGs (%q): "+
					"set PermitWithoutStream and a MinTime of at most %v in its keepalive.EnforcementPolicy",
				f.DebugData(), tcpkeepalive.Quiet/2)
			return c.over
		}
		if f.ErrCode != http2.ErrCodeNo || f.LastStreamID < stream { // the peer will not serve this call
			c.over = status.Errorf(codes.Unavailable, "the peer ends the connection: %v: %q", f.ErrCode, f.DebugData())
			return c.over
		}
	case *http2.MetaHeadersFrame:
		return c.side.headers(f)
	}
	return nil // PRIORITY, and frame types that are newer than this: RFC 9113, 4.1
}

func (c *conn) settings(f *http2.SettingsFrame) error {
	if f.IsAck() {
		return nil
	}
	if v, ok := f.Value(http2.SettingMaxFrameSize); ok {
		if v < defaultFrame || v > largestFrame {
			return c.broken("frames of at most %d bytes", v)
		}
		c.sendWindow.frame.Store(int64(v))
	}
	if v, ok := f.Value(http2.SettingInitialWindowSize); ok {
		if v > wholeWindow {
			return c.broken("a window of %d bytes", v)
		}
		c.sendWindow.resize(int64(v))
	}
	return c.written(c.control.WriteSettingsAck())
}

// written turns the error of a write into the error of the call; nil stays nil.
func (c *conn) written(err error) error {
	if err != nil {
		return c.lost(err)
	}
	return nil
}

// stash reads a frame while the only goroutine of this side waits for a sendWindow, and keeps messages for later. It
// keeps no more than this side's own window allows, or maxAhead.
func (c *conn) stash() error {
	if c.left == 0 {
		return c.next()
	}
	if len(c.ahead)+c.left > min(c.window, maxAhead) {
		return c.broken("more data than the window allows")
	}
	at := len(c.ahead)
	c.ahead = append(c.ahead, make([]byte, c.left)...)
	n, err := c.read(c.ahead[at:]) // the peer gets credit when the message is taken from here
	c.ahead = c.ahead[:at+n]
	return err
}
