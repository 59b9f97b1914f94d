// SPDX-License-Identifier: Apache-2.0

package pagelane

import (
	"bufio"
	"context"
	"encoding/binary"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/internal/alive"
	"github.com/migrated-vm/migrated/internal/pagewire"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// linger is how long a client may take to read how its lane ended.
const linger = time.Second

// A Server serves the lanes among the connections of a gRPC server.
type Server struct {
	serve func(*Stream) error

	mu     sync.Mutex
	open   map[net.Conn]struct{}
	closed bool
	lanes  sync.WaitGroup
}

// NewServer returns a server that calls serve for each lane. The lane ends when serve returns, with the status of its
// error.
func NewServer(serve func(*Stream) error) *Server {
	return &Server{serve: serve, open: map[net.Conn]struct{}{}}
}

// Credentials are those of the gRPC server: connections are made in the way of inner, and lanes are taken out from
// among them.
func (s *Server) Credentials(inner credentials.TransportCredentials) credentials.TransportCredentials {
	return &dispatcher{inner, s}
}

// Close ends all lanes and waits until none is served any more.
func (s *Server) Close() {
	s.mu.Lock()
	s.closed = true
	for c := range s.open {
		_ = c.Close()
	}
	s.mu.Unlock()
	s.lanes.Wait()
}

type dispatcher struct {
	credentials.TransportCredentials
	server *Server
}

// ServerHandshake implements credentials.TransportCredentials. It does not return before the client has sent its
// first frame, which every client does without waiting for anything (RFC 9113, 3.4); gRPC bounds how long that may take.
func (d *dispatcher) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	s := &socket{Conn: raw}
	c, info, err := d.TransportCredentials.ServerHandshake(s)
	if err != nil {
		return c, info, err
	}
	in := bufio.NewReaderSize(c, readBuffer)
	lane, err := isLane(in)
	switch {
	case err != nil:
		return nil, nil, err
	case !lane:
		return &seen{c, in}, info, nil
	}
	return nil, nil, d.server.take(s, c, in, info)
}

// isLane looks at what a client says first, and takes nothing. It does not look further than what every client sends
// without waiting: the preface, and a SETTINGS frame that may be empty.
func isLane(in *bufio.Reader) (bool, error) {
	const settings = len(http2.ClientPreface)
	start, err := in.Peek(settings + frameHeader)
	if err != nil {
		return false, err
	}
	length := int(start[settings])<<16 | int(start[settings+1])<<8 | int(start[settings+2])
	if string(start[:settings]) != http2.ClientPreface || http2.FrameType(start[settings+3]) != http2.FrameSettings || length < setting {
		return false, nil
	}
	start, err = in.Peek(settings + frameHeader + setting)
	if err != nil {
		return false, err
	}
	return http2.SettingID(binary.BigEndian.Uint16(start[settings+frameHeader:])) == laneSetting, nil
}

// seen is a connection of which something was read already.
type seen struct {
	net.Conn
	in *bufio.Reader
}

func (s *seen) Read(p []byte) (int, error) {
	if s.in == nil {
		return s.Conn.Read(p)
	}
	n, err := s.in.Read(p[:min(len(p), s.in.Buffered())])
	if s.in.Buffered() == 0 {
		s.in = nil
	}
	return n, err
}

// take serves a lane apart from gRPC, which is told that the connection is none of its own any more.
func (s *Server) take(raw *socket, c net.Conn, in *bufio.Reader, info credentials.AuthInfo) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return net.ErrClosed
	}
	s.open[c] = struct{}{}
	s.lanes.Go(func() {
		s.run(raw, c, in, info)
		// The client hangs up when it has read how its lane ended. If this side went first, TCP could make it
		// forget that.
		time.AfterFunc(linger, func() { s.forget(c) })
	})
	return credentials.ErrConnDispatched
}

func (s *Server) forget(c net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.open, c)
	_ = c.Close() // all that was to be said is
}

// run serves one connection to its end.
func (s *Server) run(raw *socket, c net.Conn, in *bufio.Reader, info credentials.AuthInfo) {
	ctx, end := context.WithCancel(peer.NewContext(context.Background(), &peer.Peer{Addr: c.RemoteAddr(), LocalAddr: c.LocalAddr(), AuthInfo: info}))
	defer end()
	t := &Stream{conn: newConn(c, in, firstWindow), socket: raw}
	t.headers = t.request
	t.awaitWindow = t.stash
	hello := time.AfterFunc(alive.Quiet, func() { _ = c.Close() }) // who says no more than that it is a lane is none
	md, err := t.greet()
	if !hello.Stop() || err != nil {
		return
	}
	t.ctx = metadata.NewIncomingContext(ctx, md)
	err = s.serve(t)
	expire := time.AfterFunc(linger, func() { _ = c.Close() }) // the lane's goroutine may be writing still
	defer expire.Stop()
	t.finish(err)
}

// A Stream is the source's side of a lane. One goroutine at a time may use it. Who is in RecvMsg or SendMsg still when the
// lane's handler returns is freed within linger.
type Stream struct {
	*conn
	socket   *socket         // that of conn, which may be TLS
	ctx      context.Context //nolint:containedctx // it is the life of the call
	asked    metadata.MD
	accepted bool
}

// Context has the caller and the metadata of the call.
func (t *Stream) Context() context.Context { return t.ctx }

// greet reads all that the client has to say before its first message.
func (t *Stream) greet() (metadata.MD, error) {
	if err := t.control.WriteSettings(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 1}); err != nil {
		return nil, err
	}
	if _, err := t.in.Discard(len(http2.ClientPreface)); err != nil {
		return nil, err
	}
	for t.asked == nil {
		if t.over != nil {
			return nil, t.over
		}
		if err := t.next(); err != nil {
			return nil, err
		}
	}
	return t.asked, nil
}

// request deals with the headers that begin the call.
func (t *Stream) request(f *http2.MetaHeadersFrame) error {
	if f.StreamID != stream || t.asked != nil {
		return t.broken("a second call on the connection of a lane")
	}
	if path := f.PseudoValue("path"); path != migratedv1.PageService_Fetch_FullMethodName || f.StreamEnded() {
		return t.broken("a call of %q on the connection of a lane", path)
	}
	t.asked = metadata.MD{}
	for _, field := range f.RegularFields() {
		if strings.HasSuffix(field.Name, "-bin") {
			continue // no lane has any
		}
		t.asked.Append(field.Name, field.Value)
	}
	return nil
}

// SendHeader accepts the lane. Call it before the first message: from now on the lane has a thread.
func (t *Stream) SendHeader(metadata.MD) error {
	t.accepted = true
	if err := t.socket.leavePoller(); err != nil {
		return lost(err)
	}
	return t.write(false, acceptance...)
}

// acceptance are the fields that begin every response.
var acceptance = []hpack.HeaderField{{Name: ":status", Value: "200"}, {Name: "content-type", Value: "application/grpc"}}

// finish says how the lane ended, if there still is somebody to be told.
func (t *Stream) finish(err error) {
	st := status.Convert(err)
	var fields []hpack.HeaderField
	if !t.accepted {
		fields = acceptance
	}
	_ = t.write(true, append(fields[:len(fields):len(fields)],
		hpack.HeaderField{Name: statusField, Value: strconv.Itoa(int(st.Code()))},
		hpack.HeaderField{Name: messageField, Value: escaped(st.Message())})...)
}

// write writes headers. It has a framer of its own, as the lane's goroutine may read still and answer by control.
func (t *Stream) write(last bool, fields ...hpack.HeaderField) error {
	return writeHeaders(http2.NewFramer(t, nil), last, fields...)
}

// RecvMsg receives a *pagewire.Request; io.EOF says that the client has no more.
func (t *Stream) RecvMsg(m any) error {
	message, err := t.message(maxRequest)
	if err != nil {
		return err
	}
	return m.(*pagewire.Request).Decode(message)
}

// SendMsg sends a *pagewire.Reply. Its Data is taken away.
func (t *Stream) SendMsg(m any) error {
	e, err := m.(*pagewire.Reply).Encode()
	if err != nil {
		return err
	}
	defer e.Release()
	return t.send(e.Bytes)
}
