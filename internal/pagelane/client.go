// SPDX-License-Identifier: Apache-2.0

package pagelane

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/internal/alive"
	"github.com/migrated-vm/migrated/internal/pagewire"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// Dial connects to address, HOST:PORT, in the way of creds.
func Dial(ctx context.Context, address string, creds credentials.TransportCredentials) (net.Conn, error) {
	raw, err := alive.Dial(ctx, address)
	if err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	s := &socket{Conn: raw}
	c, err := handshake(ctx, address, s, creds)
	if err != nil {
		_ = s.Close() // the error says enough
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	return c, nil
}

func handshake(ctx context.Context, address string, s *socket, creds credentials.TransportCredentials) (net.Conn, error) {
	c, _, err := creds.ClientHandshake(ctx, address, s)
	if err != nil {
		return nil, fmt.Errorf("authentication handshake failed: %w", err)
	}
	return c, s.leavePoller()
}

// A Client is the destination's side of a lane. One goroutine may send while another one receives.
type Client struct {
	*conn
	ctx    context.Context //nolint:containedctx // it is the life of the call
	cancel context.CancelFunc
	opened chan struct{} // the peer's window has been opened; holds one
	begun  bool          // the response's headers have come
	pulse  *pulse
}

// Open makes the call on a connection that carried nothing yet, and waits until the server accepts it. The lane lives
// until the server ends it or ctx ends; either closes the connection, and so does an error, which is a gRPC status
// or ErrBroken.
func Open(ctx context.Context, c net.Conn, md metadata.MD) (*Client, error) {
	return openWith(ctx, c, md, alive.Quiet)
}

// openWith has the lane ask that often whether the source is there.
func openWith(ctx context.Context, c net.Conn, md metadata.MD, every time.Duration) (*Client, error) {
	l := &Client{conn: newConn(c, bufio.NewReaderSize(c, readBuffer), wholeWindow), opened: make(chan struct{}, 1)}
	l.ctx, l.cancel = context.WithCancel(ctx)
	l.headers = l.response
	l.pulse = newPulse(every, func() error { return http2.NewFramer(c, nil).WritePing(false, [8]byte{}) }, l.end)
	l.acked = func() { l.pulse.acks.Add(1) }
	l.heard = func(n int) { l.pulse.heard.Add(uint64(n)) }
	l.conn.opened = func() {
		select {
		case l.opened <- struct{}{}:
		default: // said already
		}
	}
	l.awaitWindow = func() error {
		select {
		case <-l.opened:
			return nil
		case <-l.ctx.Done():
			return io.EOF
		}
	}
	context.AfterFunc(l.ctx, l.end)
	if err := l.open(c.RemoteAddr().String(), md); err != nil {
		l.end()
		return nil, err
	}
	l.pulse.idle.Store(true)
	l.pulse.start()
	return l, nil
}

func (l *Client) open(authority string, md metadata.MD) error {
	hello, err := greeting(authority, md)
	if err != nil {
		return err
	}
	if _, err := l.Write(hello); err != nil {
		return lost(err)
	}
	for !l.begun && l.over == nil {
		if err := l.next(); err != nil {
			return err
		}
	}
	if !l.begun {
		return l.over
	}
	return nil
}

// end closes the connection. Nothing is in it that will not be asked for again.
func (l *Client) end() {
	l.pulse.stop()
	l.cancel()
	_ = l.Close()
}

// greeting is all that a client has to say before its first message.
func greeting(authority string, md metadata.MD) ([]byte, error) {
	var out bytes.Buffer
	out.WriteString(http2.ClientPreface)
	write := http2.NewFramer(&out, nil)
	if err := write.WriteSettings(
		http2.Setting{ID: laneSetting, Val: 1}, // first: see Server
		http2.Setting{ID: http2.SettingEnablePush, Val: 0},
		http2.Setting{ID: http2.SettingMaxFrameSize, Val: largestFrame},
		http2.Setting{ID: http2.SettingInitialWindowSize, Val: wholeWindow},
	); err != nil {
		return nil, err
	}
	if err := write.WriteWindowUpdate(0, wholeWindow-firstWindow); err != nil {
		return nil, err
	}
	fields := []hpack.HeaderField{
		{Name: ":method", Value: "POST"},
		{Name: ":scheme", Value: "http"},
		{Name: ":path", Value: migratedv1.PageService_Fetch_FullMethodName},
		{Name: ":authority", Value: authority},
		{Name: "content-type", Value: "application/grpc"},
		{Name: "te", Value: "trailers"},
	}
	for key, values := range md {
		for _, value := range values {
			fields = append(fields, hpack.HeaderField{Name: key, Value: value, Sensitive: key == pagewire.MigrationTokenKey})
		}
	}
	err := writeHeaders(write, false, fields...)
	return out.Bytes(), err
}

// response deals with headers: those that begin the response, and those that end it.
func (l *Client) response(f *http2.MetaHeadersFrame) error {
	if f.StreamID != stream {
		return l.broken("headers of a stream that is none")
	}
	if !f.StreamEnded() {
		if s := f.PseudoValue("status"); s != "200" {
			return l.broken("HTTP status %q", s)
		}
		l.begun = true
		return nil
	}
	l.over = ended(f)
	return nil
}

// Alone says, before the first message, that one goroutine both sends and receives: while it waits to send, it takes what comes.
func (l *Client) Alone() { l.awaitWindow = l.stash }

// SendMsg sends a *pagewire.Request. io.EOF says that the call is over: RecvMsg says why.
func (l *Client) SendMsg(m any) error {
	e, err := m.(*pagewire.Request).Encode()
	if err != nil {
		return err
	}
	defer e.Release()
	if err := l.send(e.Bytes); err != nil {
		l.end() // who receives is to learn of it
		return io.EOF
	}
	return nil
}

// CloseSend says that no more requests will come.
func (l *Client) CloseSend() error {
	var frame [frameHeader]byte
	putHeader(frame[:], 0, http2.FlagDataEndStream)
	if _, err := l.Write(frame[:]); err != nil {
		return lost(err)
	}
	return nil
}

// RecvMsg receives a *pagewire.Reply, whose Data is valid until the next call. It returns io.EOF when the server has ended
// the call well, and otherwise a gRPC status, ErrBroken or pagewire.ErrMalformed.
func (l *Client) RecvMsg(m any) error {
	l.pulse.idle.Store(false)
	message, err := l.message(pagewire.MaxReplyBytes)
	l.pulse.idle.Store(true)
	if err == nil {
		err = m.(*pagewire.Reply).Decode(message)
	}
	if err != nil {
		l.end()
		return l.pulse.explain(err)
	}
	return nil
}
