// SPDX-License-Identifier: Apache-2.0

package pagelane

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/pkg/pagelane/tcpkeepalive"
	"github.com/migrated-vm/migrated/pkg/pagewire"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// linger is how long a client may take to read how its lane ended.
const linger = time.Second

// Widen raises the TCP send buffer of each connection that listener accepts from now on to 16 MiB: as much as a sweep
// may have in flight. It needs CAP_NET_ADMIN. It works on the listener, from which connections inherit the size,
// because the process may have dropped the capability before they come. Without Widen, net.ipv4.tcp_wmem limits the
// buffer; SO_SNDBUF would make it smaller.
//
// The receive buffer is left to the kernel, which grows it as data comes. If it were set (SO_RCVBUFFORCE) on an open
// connection, the connection would keep its first window, 64 KiB.
func Widen(listener syscall.Conn) error {
	raw, err := listener.SyscallConn()
	if err != nil {
		return err
	}
	controlErr := raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sendBuffer)
	})
	return errors.Join(controlErr, err)
}

// Server serves the lanes among the connections of a gRPC server.
type Server struct {
	serve  func(*Stream) error
	sleeps Sleeps

	mu     sync.Mutex
	open   map[net.Conn]struct{}
	closed bool
	lanes  sync.WaitGroup
}

// NewServer returns a server that calls serve for each lane, each in a goroutine of its own. The lane ends when serve
// returns, with the status of its error. sleeps is told of the goroutines that sleep in system calls.
func NewServer(serve func(*Stream) error, sleeps Sleeps) *Server {
	return &Server{serve: serve, sleeps: sleeps, open: map[net.Conn]struct{}{}}
}

// Credentials returns the credentials for the gRPC server. They make the handshake of inner, and take lanes out from
// among the connections.
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

// ServerHandshake implements credentials.TransportCredentials. It does not return before the client has sent its first
// frame. Every client sends it without waiting for anything (RFC 9113, 3.4), and gRPC bounds how long that may take.
func (d *dispatcher) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	s := &socket{Conn: raw, sleeps: d.server.sleeps}
	r := &records{socket: s}
	c, info, err := d.TransportCredentials.ServerHandshake(r)
	if err != nil {
		return c, info, err
	}
	c = r.laneConn(c)
	in := bufio.NewReaderSize(c, readBuffer)
	lane, err := isLane(in)
	switch {
	case err != nil:
		return nil, nil, err
	case !lane:
		return &seen{otherConn(c), in}, info, nil
	}
	return nil, nil, d.server.take(s, c, in, info)
}

// isLane peeks at what a client sends first, and reports whether it opens a lane. It needs only what every client sends
// without waiting: the preface, and a SETTINGS frame that may be empty.
func isLane(in *bufio.Reader) (bool, error) {
	const settings = len(http2.ClientPreface)
	start, err := in.Peek(settings + frameHeader)
	if err != nil {
		return false, err
	}
	length := int(start[settings])<<16 | int(start[settings+1])<<8 | int(start[settings+2])
	if string(start[:settings]) != http2.ClientPreface ||
		http2.FrameType(start[settings+3]) != http2.FrameSettings || length < setting {
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

// take serves a lane outside of gRPC. Its error tells gRPC that the connection is no longer its own.
func (s *Server) take(raw *socket, c net.Conn, in *bufio.Reader, info credentials.AuthInfo) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return net.ErrClosed
	}
	s.open[c] = struct{}{}
	s.lanes.Go(func() {
		s.run(raw, c, in, info)
		// The client hangs up when it has read how its lane ended. If this side hung up first, TCP could lose what the
		// client has not read yet.
		time.AfterFunc(linger, func() { s.forget(c) })
	})
	return credentials.ErrConnDispatched
}

func (s *Server) forget(c net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.open, c)
	_ = c.Close() // nothing is left to send
}

// run serves one connection to its end.
func (s *Server) run(raw *socket, c net.Conn, in *bufio.Reader, info credentials.AuthInfo) {
	ctx, end := context.WithCancel(peer.NewContext(context.Background(), &peer.Peer{
		Addr: c.RemoteAddr(), LocalAddr: c.LocalAddr(), AuthInfo: info,
	}))
	defer end()
	t := newStream(raw, c, in)
	// Close a connection that is marked as a lane but does not begin its call in time.
	hello := time.AfterFunc(tcpkeepalive.Quiet, func() { _ = c.Close() })
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

// Stream is the source's side of a lane. One goroutine at a time may use it, but see Attend. A goroutine that is still
// in Recv or Send when the lane's handler returns gets an error within a second.
type Stream struct {
	*conn
	socket   *socket         // the socket of conn, which may be TLS
	ctx      context.Context //nolint:containedctx // it is the life of the call
	call     metadata.MD     // the fields of the call's headers; nil: they have not come
	accepted bool
	attended chan struct{} // closed when the goroutine of Attend reads no more; nil: there is none
}

// newStream returns a stream of which nothing was read yet.
func newStream(raw *socket, c net.Conn, in *bufio.Reader) *Stream {
	t := &Stream{conn: newConn(c, in, firstWindow), socket: raw}
	t.side = t
	return t
}

// Context returns the context of the call, which has the caller (package peer of gRPC) and the metadata. It ends with
// the lane.
func (t *Stream) Context() context.Context { return t.ctx }

// greet reads all that the client has to say before its first message.
func (t *Stream) greet() (metadata.MD, error) {
	if err := t.control.WriteSettings(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 1}); err != nil {
		return nil, err
	}
	if _, err := t.in.Discard(len(http2.ClientPreface)); err != nil {
		return nil, err
	}
	for t.call == nil {
		if t.over != nil {
			return nil, t.over
		}
		if err := t.next(); err != nil {
			return nil, err
		}
	}
	return t.call, nil
}

// headers implements side. Headers begin the call.
func (t *Stream) headers(f *http2.MetaHeadersFrame) error {
	if f.StreamID != stream || t.call != nil {
		return t.broken("a second call on the connection of a lane")
	}
	if path := f.PseudoValue("path"); path != migratedv1.PageService_Fetch_FullMethodName || f.StreamEnded() {
		return t.broken("a call of %q on the connection of a lane", path)
	}
	t.call = metadata.MD{}
	for _, field := range f.RegularFields() {
		if strings.HasSuffix(field.Name, "-bin") {
			continue // no lane has such a field
		}
		t.call.Append(field.Name, field.Value)
	}
	return nil
}

// awaitWindow implements side. It reads a frame, which may open the window: no other goroutine does.
func (t *Stream) awaitWindow() error {
	if t.attended != nil { // what that goroutine has read may have opened it
		t.awaitReader()
		return nil
	}
	return t.stash()
}

// Attend has another goroutine read for a while, so that the client's PINGs are answered although the lane's own
// goroutine waits for something else. Requests that come are kept for Recv. After stop, that goroutine reads to the end
// of the frame that it waits for. Recv then waits for it, and Send only if it needs a window. A read cannot be broken
// off, and nothing is to wait for one when the lane goes on.
func (t *Stream) Attend() (stop func()) {
	t.awaitReader()
	var stopped atomic.Bool
	ended := make(chan struct{})
	t.attended = ended
	go func() {
		defer close(ended)
		for !stopped.Load() && t.stash() == nil { // Recv finds the error again
		}
	}()
	return func() { stopped.Store(true) }
}

// awaitReader waits until the goroutine of Attend reads no more.
func (t *Stream) awaitReader() {
	if t.attended != nil {
		<-t.attended
		t.attended = nil
	}
}

// Accept accepts the lane. Call it before the first message. From then on the goroutine that receives and sends sleeps
// in system calls, each time in a thread of its own.
func (t *Stream) Accept() error {
	t.accepted = true
	if err := t.socket.leavePoller(); err != nil {
		return lost(err)
	}
	return t.write(false, acceptance...)
}

// acceptance are the fields that begin every response.
var acceptance = []hpack.HeaderField{{Name: ":status", Value: "200"}, {Name: "content-type", Value: "application/grpc"}}

// finish tells the client how the lane ended, if the client is still there.
func (t *Stream) finish(err error) {
	st := status.Convert(err)
	var fields []hpack.HeaderField
	if !t.accepted {
		fields = acceptance
	}
	fields = append(fields[:len(fields):len(fields)],
		hpack.HeaderField{Name: statusField, Value: strconv.Itoa(int(st.Code()))},
		hpack.HeaderField{Name: messageField, Value: escaped(st.Message())})
	_ = t.write(true, append(fields, detailsOf(st)...)...)
}

// write writes headers. It has a framer of its own, because the lane's goroutine may still read and answer by control.
func (t *Stream) write(last bool, fields ...hpack.HeaderField) error {
	return writeHeaders(http2.NewFramer(t, nil), last, fields...)
}

// Recv receives a request. The error io.EOF says that the client has no more; others are a gRPC status, ErrBroken or
// pagewire.ErrMalformed.
func (t *Stream) Recv(request *pagewire.Request) error {
	t.awaitReader()
	message, err := t.message(maxRequest)
	if err != nil {
		return err
	}
	return request.Decode(message)
}

// Send sends a reply, and takes its Data away. It waits while the client takes no more replies, and reads requests
// meanwhile.
func (t *Stream) Send(reply *pagewire.Reply) error {
	e, err := reply.Encode()
	if err != nil {
		return err
	}
	defer e.Release()
	return t.send(e.Bytes)
}
