// SPDX-License-Identifier: Apache-2.0

package pagelane

import (
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

	"github.com/migrated-vm/migrated/pkg/pagelane/tcpkeepalive"
	"github.com/migrated-vm/migrated/pkg/pagewire"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// rawPeer sends and receives single frames of HTTP/2.
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

// rawClient opens a connection as the client of a lane, with these settings besides, and makes no call yet.
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

// request encodes a request for one run, with gRPC's prefix.
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

// TestServerHangsUp: the server closes the connection if a client breaks the rules.
func TestServerHangsUp(t *testing.T) {
	const path = migratedv1.PageService_Fetch_FullMethodName
	for name, speak := range map[string]func(p *rawPeer){
		"another call":           func(p *rawPeer) { p.call("/grpc.health.v1.Health/Check") },
		"data before the call":   func(p *rawPeer) { p.must(p.WriteData(stream, false, request(p.t, 1, 4096))) },
		"data of another stream": func(p *rawPeer) { p.call(path); p.must(p.WriteData(3, false, request(p.t, 1, 4096))) },
		"a second call":          func(p *rawPeer) { p.call(path); p.call(path) },
		"a message without end": func(p *rawPeer) {
			p.call(path)
			p.must(p.WriteData(stream, false, []byte{0, 255, 0, 0, 0}))
		},
		"compressed by gRPC": func(p *rawPeer) {
			p.call(path)
			p.must(p.WriteData(stream, false, []byte{1, 0, 0, 0, 0}))
		},
		"an end within a message": func(p *rawPeer) { p.call(path); p.must(p.WriteData(stream, true, []byte{0, 0})) },
		"data after the end": func(p *rawPeer) {
			p.call(path)
			p.must(p.WriteData(stream, true, nil))
			p.must(p.WriteData(stream, false, nil))
		},
		"a frame size that is none": func(p *rawPeer) {
			p.must(p.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1}))
		},
		"a window of no bytes more": func(p *rawPeer) {
			p.must(p.WriteRawFrame(http2.FrameWindowUpdate, 0, 0, make([]byte, 4)))
		},
		"a huge frame of settings": func(p *rawPeer) {
			p.must(p.WriteRawFrame(http2.FrameSettings, 0, 0, make([]byte, 60000)))
		},
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

// askOne requests a page and receives one reply.
func askOne(l *Client) error {
	if err := l.Send(pageAt(0)); err != nil {
		return err
	}
	return takeOne(l)
}

// takeOne receives one reply.
func takeOne(l *Client) error { return l.Recv(new(pagewire.Reply)) }

// clientOf opens a lane to a server that speak plays, and passes it to use, whose result comes on the channel.
func clientOf(t *testing.T, w pair, every time.Duration, use func(*Client) error, speak func(p *rawPeer)) <-chan error {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	got := make(chan error, 1)
	go func() {
		conn, err := Dial(t.Context(), listener.Addr().String(), w.client, nil)
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
	if conn, _, err = w.server.ServerHandshake(struct{ net.Conn }{conn}); err != nil {
		t.Fatal(err)
	}
	p := newRawPeer(t, conn)
	p.must(p.WriteSettings())
	speak(p)
	go func() { _, _ = io.Copy(io.Discard, conn) }() // so that closing the connection sends no RST
	return got
}

// TestClientOfBrokenServer: whatever a server sends, the client returns an error that names the reason.
func TestClientOfBrokenServer(t *testing.T) {
	eachWay(t, func(t *testing.T, w pair) {
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
			"hangs up":           {func(p *rawPeer) { accept(p); _ = p.Close() }, unavailable},
			"goes away":          {func(p *rawPeer) { p.must(p.WriteGoAway(0, http2.ErrCodeProtocol, nil)) }, unavailable},
			"goes away in peace": {func(p *rawPeer) { accept(p); p.must(p.WriteGoAway(0, http2.ErrCodeNo, nil)) }, unavailable},
			"resets": {func(p *rawPeer) {
				accept(p)
				p.must(p.WriteRSTStream(stream, http2.ErrCodeInternal))
			}, unavailable},
			"is a web server": {func(p *rawPeer) {
				header(p, false, hpack.HeaderField{Name: ":status", Value: "404"})
			}, broken},
			"has no status": {
				func(p *rawPeer) { accept(p); header(p, true) },
				func(err error) bool { return status.Code(err) == codes.Unknown },
			},
			"has a wrong status": {func(p *rawPeer) {
				accept(p)
				header(p, true, hpack.HeaderField{Name: statusField, Value: "x"})
			}, broken},
			"has wrong details": {func(p *rawPeer) {
				accept(p)
				header(
					p, true, hpack.HeaderField{Name: statusField, Value: "5"}, hpack.HeaderField{Name: detailsField, Value: "AAAA"},
				)
			}, func(err error) bool {
				return status.Code(err) == codes.NotFound && len(status.Convert(err).Details()) == 0
			}},
			"has details of another status": {func(p *rawPeer) {
				accept(p)
				header(p, true, append(detailsOf(withReason(codes.DataLoss)), hpack.HeaderField{Name: statusField, Value: "5"})...)
			}, func(err error) bool {
				return status.Code(err) == codes.NotFound && len(status.Convert(err).Details()) == 0
			}},
			"sends too much": {func(p *rawPeer) {
				accept(p)
				p.must(p.WriteData(stream, false, []byte{0, 255, 0, 0, 0}))
			}, broken},
			"sends no page": {
				func(p *rawPeer) { accept(p); p.must(p.WriteData(stream, false, prefixed([]byte("no page")))) },
				func(err error) bool { return errors.Is(err, pagewire.ErrMalformed) },
			},
			"ends within a reply": {func(p *rawPeer) {
				accept(p)
				p.must(p.WriteData(stream, true, []byte{0, 0, 0, 1, 0, 5}))
			}, broken},
			"has another stream": {func(p *rawPeer) { accept(p); p.must(p.WriteData(5, false, nil)) }, broken},
			"speaks another thing": {func(p *rawPeer) {
				_, _ = io.WriteString(p.Conn, "220 mail.example ESMTP, and what it has to say\r\n")
				_ = p.Close()
			}, func(err error) bool { return err != nil }},
		} {
			t.Run(name, func(t *testing.T) {
				got := clientOf(t, w, tcpkeepalive.Quiet, takeOne, c.speak)
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
	})
}

// withReason returns a status with details.
func withReason(code codes.Code) *status.Status {
	st, err := status.New(code, "").WithDetails(&migratedv1.MigrationError{Reason: refusal})
	if err != nil {
		panic(err)
	}
	return st
}

// TestAbort: Abort ends a Send that waits for a window, and a Recv that waits for a reply.
func TestAbort(t *testing.T) {
	eachWay(t, func(t *testing.T, w pair) {
		waits := make(chan *Client)
		done := clientOf(t, w, tcpkeepalive.Quiet, func(l *Client) error {
			received := make(chan error, 1)
			go func() { received <- l.Recv(new(pagewire.Reply)) }()
			waits <- l
			err := l.Send(pageAt(0))
			if !errors.Is(err, io.EOF) {
				return fmt.Errorf("the sender says %w", err)
			}
			return <-received
		}, func(p *rawPeer) {
			p.must(p.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0}))
			p.must(writeHeaders(p.Framer, false, hpack.HeaderField{Name: ":status", Value: "200"}))
		})
		(<-waits).Abort()
		select {
		case err := <-done:
			if status.Code(err) != codes.Unavailable {
				t.Errorf("the receiver says %v", err)
			}
		case <-time.After(patience):
			t.Error("they wait for ever")
		}
	})
}
