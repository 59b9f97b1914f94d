// SPDX-License-Identifier: Apache-2.0

package pagelane

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/pkg/pagelane/tcpkeepalive"
	"github.com/migrated-vm/migrated/pkg/pagewire"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// Dial connects to address, HOST:PORT, and does the handshake of creds. Pass the connection to Open. Over plain TCP or
// TLS 1.3, its Read and Write block in system calls, and sleeps is called for them. Errors are gRPC statuses with
// codes.Unavailable.
func Dial(
	ctx context.Context, address string, creds credentials.TransportCredentials, sleeps Sleeps,
) (net.Conn, error) {
	raw, err := tcpkeepalive.Dial(ctx, address)
	if err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	s := &socket{Conn: raw, sleeps: sleeps}
	c, err := handshake(ctx, address, s, creds)
	if err != nil {
		_ = s.Close() // err says enough
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	return c, nil
}

func handshake(
	ctx context.Context, address string, s *socket, creds credentials.TransportCredentials,
) (net.Conn, error) {
	r := &records{socket: s}
	c, _, err := creds.ClientHandshake(ctx, address, r)
	if err != nil {
		return nil, fmt.Errorf("authentication handshake failed: %w", err)
	}
	return r.laneConn(c), s.leavePoller()
}

// Client is the destination's side of a lane. One goroutine may send while another one receives.
type Client struct {
	*conn
	ctx       context.Context //nolint:containedctx // it is the life of the call
	cancel    context.CancelFunc
	alone     bool // one goroutine both sends and receives
	begun     bool // the response's headers have come
	keepalive *keepalive
}

// Open makes the call on a connection that carried nothing yet, and waits until the server accepts it. The lane lives
// until the server ends it or ctx ends; both close the connection. An error closes it, too, and is a gRPC status or
// ErrBroken.
//
// md is the metadata of the call (pagewire.Call.Metadata). If it says that this is a bulk lane, one goroutine must both
// send and receive: Send then reads replies while it waits for the flow control of HTTP/2, and keeps them for Recv.
func Open(ctx context.Context, c net.Conn, md metadata.MD) (*Client, error) {
	return openWith(ctx, c, md, tcpkeepalive.Quiet)
}

// openWith is Open with a keepalive that sends its PINGs that often.
func openWith(ctx context.Context, c net.Conn, md metadata.MD, every time.Duration) (*Client, error) {
	l := newClient(ctx, c, every)
	l.alone = slices.Contains(md[pagewire.LaneKey], pagewire.BulkLane)
	context.AfterFunc(l.ctx, l.end)
	if err := l.open(c.RemoteAddr().String(), md); err != nil {
		l.end()
		return nil, err
	}
	l.keepalive.start()
	return l, nil
}

// newClient returns a client that has not begun the call.
func newClient(ctx context.Context, c net.Conn, every time.Duration) *Client {
	l := &Client{conn: newConn(c, bufio.NewReaderSize(c, readBuffer), wholeWindow)}
	l.side = l
	l.sendWindow.opened = make(chan struct{}, 1)
	l.patience = 2 * every
	l.ctx, l.cancel = context.WithCancel(ctx)
	l.keepalive = newKeepalive(l, every)
	return l
}

// open begins the call, and waits until the server accepts it or says why not.
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

// Abort ends the call: the connection is closed, and goroutines that wait in a method of the lane go on. It may be
// called more than once, from any goroutine.
func (l *Client) Abort() { l.end() }

// end closes the connection. Everything that is still in it will be asked for again.
func (l *Client) end() {
	l.keepalive.stop()
	l.cancel()
	_ = l.Close()
}

// ping asks the server whether it is there. Any goroutine may call it.
func (l *Client) ping() error { return http2.NewFramer(l.Conn, nil).WritePing(false, [8]byte{}) }

// greeting returns the bytes that a client sends before its first message.
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

// headers implements side. Headers begin the response, or end it.
func (l *Client) headers(f *http2.MetaHeadersFrame) error {
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

// awaitWindow implements side.
func (l *Client) awaitWindow() error {
	if l.alone {
		return l.readAhead()
	}
	return l.awaitReader()
}

// readAhead reads a frame, which may open the window. No other goroutine reads.
func (l *Client) readAhead() error {
	if l.over != nil && l.left == 0 {
		return io.EOF // the server has ended the call: no window will come
	}
	l.keepalive.reading.Store(true)
	defer l.keepalive.reading.Store(false)
	return l.stash()
}

// awaitReader waits until the reading goroutine has opened the window, or for one PING interval.
func (l *Client) awaitReader() error {
	timeout := time.NewTimer(l.keepalive.every)
	defer timeout.Stop()
	select {
	case <-l.sendWindow.opened:
		return nil
	case <-timeout.C:
		return nil
	case <-l.ctx.Done():
		return io.EOF
	}
}

// Send sends a request. It waits while the source accepts no more. io.EOF means that the call is over; Recv returns
// why.
func (l *Client) Send(request *pagewire.Request) error {
	e, err := request.Encode()
	if err != nil {
		return err
	}
	defer e.Release()
	bytes := int64(0)
	for _, r := range request.Ranges {
		bytes += int64(r.Length)
	}
	l.keepalive.owed.Add(bytes) // first: the answer may be faster than send
	l.keepalive.sending.Store(true)
	defer l.keepalive.sending.Store(false)
	if err := l.send(e.Bytes); err != nil {
		if errors.Is(err, errSilent) {
			l.keepalive.silent.Store(true)
		}
		l.end() // so that the receiver learns of it
		return io.EOF
	}
	return nil
}

// CloseSend tells the source that no more requests will come. The source answers those that it has, and ends the call.
func (l *Client) CloseSend() error {
	var frame [frameHeader]byte
	putHeader(frame[:], 0, http2.FlagDataEndStream)
	l.keepalive.owed.Add(1) // the server ends the call
	if _, err := l.Write(frame[:]); err != nil {
		return lost(err)
	}
	return nil
}

// Recv receives a reply; its Data is valid until the next call. It returns io.EOF when the call has ended with status
// OK, otherwise a gRPC status, ErrBroken or pagewire.ErrMalformed.
func (l *Client) Recv(reply *pagewire.Reply) error {
	l.keepalive.reading.Store(true)
	message, err := l.message(pagewire.MaxReplyBytes)
	l.keepalive.reading.Store(false)
	if err == nil {
		err = reply.Decode(message)
	}
	if err != nil {
		l.end()
		return l.keepalive.explain(err)
	}
	answered := int64(0)
	for _, r := range reply.Runs {
		if !r.Hole { // nobody has asked for it
			answered += int64(r.Length)
		}
	}
	l.keepalive.owed.Add(-answered)
	return nil
}
