// SPDX-License-Identifier: Apache-2.0

package pagelane

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/internal/alive"
	"github.com/migrated-vm/migrated/internal/pagewire"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// A rawPeer speaks HTTP/2 frame by frame.
type rawPeer struct {
	t testing.TB
	net.Conn
	*http2.Framer
}

func newRawPeer(t testing.TB, c net.Conn) *rawPeer {
	t.Helper()
	t.Cleanup(func() { _ = c.Close() })
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	p := &rawPeer{t, c, http2.NewFramer(c, c)}
	p.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	return p
}

func (p *rawPeer) must(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

// rawClient is a client of a lane whose window and frames are as small as can be.
func rawClient(t testing.TB, address string, settings ...http2.Setting) *rawPeer {
	t.Helper()
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	p := newRawPeer(t, c)
	_, err = io.WriteString(p.Conn, http2.ClientPreface)
	p.must(err)
	p.must(p.WriteSettings(append([]http2.Setting{{ID: laneSetting, Val: 1}}, settings...)...))
	return p
}

func (p *rawPeer) call(path string) {
	p.t.Helper()
	p.must(writeHeaders(p.Framer, false, hpack.HeaderField{Name: ":method", Value: "POST"},
		hpack.HeaderField{Name: ":scheme", Value: "http"}, hpack.HeaderField{Name: ":path", Value: path}))
}

// request is a message that asks for one run.
func request(t testing.TB, offset uint64, length uint32) []byte {
	t.Helper()
	e, err := (&pagewire.Request{Ranges: []pagewire.Range{{Offset: offset, Length: length}}}).Encode()
	if err != nil {
		t.Fatal(err)
	}
	defer e.Release()
	return prefixed(e.Bytes[pagewire.Room:])
}

func prefixed(message []byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message))), message...)
}

func echoServer(t testing.TB) string {
	t.Helper()
	address, _ := serve(t, insecure.NewCredentials(), true, func(s *Stream) error { return echo(s) })
	return address
}

// TestSmallWindow has a client that opens its window byte by byte, and sends its next requests, in pieces and padded,
// while the server waits for that.
func TestSmallWindow(t *testing.T) {
	p := rawClient(t, echoServer(t), http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1})
	p.call(migratedv1.PageService_Fetch_FullMethodName)
	const length = 4096
	ask := append(request(t, 7, length), request(t, 8, length)...)
	for i := range ask { // much of it comes while the server answers the first
		p.must(p.WriteDataPadded(stream, false, ask[i:i+1], make([]byte, i%3)))
	}
	p.must(p.WriteData(stream, true, nil))
	var got []byte
	ended := false
	for !ended {
		frame, err := p.ReadFrame()
		p.must(err)
		switch f := frame.(type) {
		case *http2.DataFrame:
			got = append(got, f.Data()...)
			if len(got) < 64 {
				p.must(p.WriteWindowUpdate(stream, 1))
			} else {
				p.must(p.WriteWindowUpdate(stream, 1000))
			}
		case *http2.MetaHeadersFrame:
			ended = f.StreamEnded()
		}
	}
	for offset := byte(7); offset <= 8; offset++ {
		n := int(binary.BigEndian.Uint32(got[1:]))
		var reply pagewire.Reply
		p.must(reply.Decode(got[prefix : prefix+n]))
		if !bytes.Equal(reply.Data, bytes.Repeat([]byte{offset}, length)) {
			t.Errorf("the reply to %d has %d bytes: % x…", offset, len(reply.Data), reply.Data[:8])
		}
		got = got[prefix+n:]
	}
	if len(got) != 0 {
		t.Errorf("%d bytes more", len(got))
	}
}

// TestLoneClient has a server that opens its window only when it has sent its replies, to a client whose one goroutine must
// take them while it waits to send.
func TestLoneClient(t *testing.T) {
	const length = 4096
	fetched := clientOf(t, alive.Quiet, func(l *Client) (err error) {
		l.Alone()
		for offset := range uint64(3) {
			err = errors.Join(err, l.SendMsg(&pagewire.Request{Ranges: []pagewire.Range{{Offset: offset, Length: length}}}))
		}
		for offset := range uint64(3) {
			var reply pagewire.Reply
			if err = errors.Join(err, l.RecvMsg(&reply)); len(reply.Runs) != 1 || reply.Runs[0].Offset != offset {
				err = errors.Join(err, fmt.Errorf("reply %d: %+v", offset, reply.Runs))
			}
			reply.Release()
		}
		return errors.Join(err, l.CloseSend())
	}, func(p *rawPeer) {
		p.must(p.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 5}))
		p.must(writeHeaders(p.Framer, false, hpack.HeaderField{Name: ":status", Value: "200"}))
		for offset := range uint64(3) {
			e, err := (&pagewire.Reply{Data: make([]byte, length), Runs: []pagewire.Run{{Offset: offset, Length: length}}}).Encode()
			p.must(err)
			p.must(p.WriteData(stream, false, prefixed(e.Bytes[pagewire.Room:])))
			e.Release()
		}
		p.must(p.WriteWindowUpdate(stream, 1000))
	})
	select {
	case err := <-fetched:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(patience):
		t.Fatal("the client waits for ever")
	}
}

// TestServerHangsUp on clients that break the rules.
func TestServerHangsUp(t *testing.T) {
	const path = migratedv1.PageService_Fetch_FullMethodName
	for name, speak := range map[string]func(p *rawPeer){
		"another call":            func(p *rawPeer) { p.call("/grpc.health.v1.Health/Check") },
		"data before the call":    func(p *rawPeer) { p.must(p.WriteData(stream, false, request(p.t, 1, 4096))) },
		"data of another stream":  func(p *rawPeer) { p.call(path); p.must(p.WriteData(3, false, request(p.t, 1, 4096))) },
		"a second call":           func(p *rawPeer) { p.call(path); p.call(path) },
		"a message without end":   func(p *rawPeer) { p.call(path); p.must(p.WriteData(stream, false, []byte{0, 255, 0, 0, 0})) },
		"compressed by gRPC":      func(p *rawPeer) { p.call(path); p.must(p.WriteData(stream, false, []byte{1, 0, 0, 0, 0})) },
		"an end within a message": func(p *rawPeer) { p.call(path); p.must(p.WriteData(stream, true, []byte{0, 0})) },
		"data after the end": func(p *rawPeer) {
			p.call(path)
			p.must(p.WriteData(stream, true, nil))
			p.must(p.WriteData(stream, false, nil))
		},
		"a frame size that is none": func(p *rawPeer) { p.must(p.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1})) },
		"a window of no bytes more": func(p *rawPeer) { p.must(p.WriteRawFrame(http2.FrameWindowUpdate, 0, 0, make([]byte, 4))) },
		"a huge frame of settings":  func(p *rawPeer) { p.must(p.WriteRawFrame(http2.FrameSettings, 0, 0, make([]byte, 60000))) },
		"more padding than frame": func(p *rawPeer) {
			p.call(path)
			p.must(p.WriteRawFrame(http2.FrameData, http2.FlagDataPadded, stream, []byte{9, 0, 0}))
		},
		"a reset": func(p *rawPeer) { p.call(path); p.must(p.WriteRSTStream(stream, http2.ErrCodeCancel)) },
	} {
		t.Run(name, func(t *testing.T) {
			p := rawClient(t, echoServer(t))
			speak(p)
			for {
				if _, err := p.ReadFrame(); err != nil {
					if errors.Is(err, io.EOF) || strings.Contains(err.Error(), "reset by peer") {
						return
					}
					t.Fatal(err)
				}
			}
		})
	}
}

// takeOne takes whatever comes.
func takeOne(l *Client) error { return l.RecvMsg(new(pagewire.Reply)) }

// clientOf opens a lane to a server that speaks, and uses it: the client's end comes on the channel.
func clientOf(t *testing.T, every time.Duration, use func(*Client) error, speak func(p *rawPeer)) <-chan error {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	got := make(chan error, 1)
	go func() {
		conn, err := Dial(t.Context(), listener.Addr().String(), insecure.NewCredentials())
		if err == nil {
			var l *Client
			if l, err = openWith(t.Context(), conn, nil, every); err == nil {
				err = use(l)
			}
		}
		got <- err
	}()
	conn, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	p := newRawPeer(t, conn)
	p.must(p.WriteSettings())
	speak(p)
	go func() { _, _ = io.Copy(io.Discard, conn) }() // so that hanging up is no reset
	return got
}

// TestClientOfBrokenServer: whatever a server says, the client ends with an error that says so.
func TestClientOfBrokenServer(t *testing.T) {
	header := func(p *rawPeer, end bool, fields ...hpack.HeaderField) {
		p.must(writeHeaders(p.Framer, end, fields...))
	}
	accept := func(p *rawPeer) { header(p, false, hpack.HeaderField{Name: ":status", Value: "200"}) }
	unavailable := func(err error) bool { return status.Code(err) == codes.Unavailable }
	broken := func(err error) bool { return errors.Is(err, ErrBroken) }
	for name, c := range map[string]struct {
		speak func(p *rawPeer)
		want  func(error) bool
	}{
		"hangs up":            {func(p *rawPeer) { accept(p); _ = p.Close() }, unavailable},
		"goes away":           {func(p *rawPeer) { p.must(p.WriteGoAway(0, http2.ErrCodeProtocol, nil)) }, unavailable},
		"resets":              {func(p *rawPeer) { accept(p); p.must(p.WriteRSTStream(stream, http2.ErrCodeInternal)) }, unavailable},
		"is a web server":     {func(p *rawPeer) { header(p, false, hpack.HeaderField{Name: ":status", Value: "404"}) }, broken},
		"has no status":       {func(p *rawPeer) { accept(p); header(p, true) }, func(err error) bool { return status.Code(err) == codes.Unknown }},
		"has a wrong status":  {func(p *rawPeer) { accept(p); header(p, true, hpack.HeaderField{Name: statusField, Value: "x"}) }, broken},
		"sends too much":      {func(p *rawPeer) { accept(p); p.must(p.WriteData(stream, false, []byte{0, 255, 0, 0, 0})) }, broken},
		"sends no page":       {func(p *rawPeer) { accept(p); p.must(p.WriteData(stream, false, prefixed([]byte("no page")))) }, func(err error) bool { return errors.Is(err, pagewire.ErrMalformed) }},
		"ends within a reply": {func(p *rawPeer) { accept(p); p.must(p.WriteData(stream, true, []byte{0, 0, 0, 1, 0, 5})) }, broken},
		"has another stream":  {func(p *rawPeer) { accept(p); p.must(p.WriteData(5, false, nil)) }, broken},
		"speaks another thing": {func(p *rawPeer) {
			_, _ = io.WriteString(p.Conn, "220 mail.example ESMTP, and what it has to say\r\n")
			_ = p.Close()
		}, func(err error) bool { return err != nil }},
	} {
		t.Run(name, func(t *testing.T) {
			got := clientOf(t, alive.Quiet, takeOne, c.speak)
			select {
			case err := <-got:
				if !c.want(err) {
					t.Errorf("the client says %v", err)
				}
			case <-time.After(patience):
				t.Error("the client waits for ever")
			}
		})
	}
}
