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
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/pkg/pagelane/tcpkeepalive"
	"github.com/migrated-vm/migrated/pkg/pagewire"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// TestSmallWindow: the client opens its window byte by byte. It sends its next requests in small, padded frames while
// the server waits for the window.
func TestSmallWindow(t *testing.T) {
	p := rawClient(t, echoServer(t), http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1})
	p.call(migratedv1.PageService_Fetch_FullMethodName)
	const length = 4096
	ask := append(request(t, 7, length), request(t, 8, length)...)
	for i := range ask { // most of it comes while the server sends its first reply
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

// TestLoneClient: the server opens its window only after it has sent its replies. So a client with one goroutine must
// read replies while it waits to send.
func TestLoneClient(t *testing.T) {
	const length = 4096
	fetched := clientOf(t, plaintext(), tcpkeepalive.Quiet, func(l *Client) (err error) {
		l.alone = true
		for offset := range uint64(3) {
			err = errors.Join(err, l.Send(&pagewire.Request{Ranges: []pagewire.Range{{Offset: offset, Length: length}}}))
		}
		for offset := range uint64(3) {
			var reply pagewire.Reply
			if err = errors.Join(err, l.Recv(&reply)); len(reply.Runs) != 1 || reply.Runs[0].Offset != offset {
				err = errors.Join(err, fmt.Errorf("reply %d: %+v", offset, reply.Runs))
			}
			reply.Release()
		}
		return errors.Join(err, l.CloseSend())
	}, func(p *rawPeer) {
		p.must(p.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 5}))
		p.must(writeHeaders(p.Framer, false, hpack.HeaderField{Name: ":status", Value: "200"}))
		for offset := range uint64(3) {
			e, err := (&pagewire.Reply{
				Data: make([]byte, length), Runs: []pagewire.Run{{Offset: offset, Length: length}},
			}).Encode()
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

// closedPeer serves a lane without a window until the client closes it, or, if slow is not 0, until so many PINGs have
// come. It answers each, and if slow is not 0 it sends a page besides.
func closedPeer(p *rawPeer, slow int) {
	asked := make(chan [8]byte, 100) // a pipe has no buffer, and the client sends while it is sent to
	go func() {
		defer close(asked)
		if _, err := io.ReadFull(p.Conn, make([]byte, len(http2.ClientPreface))); err != nil {
			return
		}
		for {
			frame, err := p.ReadFrame()
			if err != nil {
				return
			}
			if ping, ok := frame.(*http2.PingFrame); ok && !ping.IsAck() {
				asked <- ping.Data
			}
		}
	}()
	p.must(p.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0}))
	p.must(writeHeaders(p.Framer, false, hpack.HeaderField{Name: ":status", Value: "200"}))
	e, err := (&pagewire.Reply{Data: make([]byte, 4096), Runs: []pagewire.Run{{Length: 4096}}}).Encode()
	p.must(err)
	defer e.Release()
	pings := 0
	for data := range asked {
		pings++
		err := p.WritePing(true, data)
		if err == nil && pings < slow {
			err = p.WriteData(stream, false, prefixed(e.Bytes[pagewire.Room:]))
		}
		if err != nil { // the client has ended the lane, and says why
			return
		}
		if pings == slow {
			p.must(writeHeaders(p.Framer, true, hpack.HeaderField{Name: statusField, Value: "0"}))
			return
		}
	}
	_ = p.Close() // a client that is patient for ever learns of the deadline
	if pings == 0 {
		p.t.Error("the client hangs up before it has asked")
	}
}

// TestClosedWindow: a server that answers every PING, but opens no window and sends nothing, ends the lane of either
// kind of client. A server that sends meanwhile is only slow.
func TestClosedWindow(t *testing.T) {
	receive := func(l *Client) error {
		for {
			if err := l.Recv(new(pagewire.Reply)); err != nil {
				return err
			}
		}
	}
	send := func(l *Client) {
		for l.Send(pageAt(0)) == nil {
		}
	}
	for name, use := range map[string]func(*Client) error{
		"a receiver beside it": func(l *Client) error {
			received := make(chan error, 1)
			go func() { received <- receive(l) }()
			send(l)
			return <-received
		},
		"alone": func(l *Client) error { l.alone = true; send(l); return receive(l) },
	} {
		result := func(t *testing.T, slow int) (err error) {
			synctest.Test(t, func(t *testing.T) { // so every PING is answered in time
				ours, theirs := net.Pipe()
				got := make(chan error, 1)
				go func() {
					l, err := openWith(t.Context(), ours, nil, time.Second)
					if err == nil {
						err = use(l)
					}
					got <- err
				}()
				closedPeer(newRawPeer(t, theirs), slow)
				err = <-got
			})
			return err
		}
		t.Run(name, func(t *testing.T) {
			err := result(t, 0)
			if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "has not answered") {
				t.Errorf("of a server that takes nothing: %v", err)
			}
			err = result(t, 10)
			if err == nil || strings.Contains(err.Error(), "has not answered") {
				t.Errorf("of one that is only slow: %v", err)
			}
		})
	}
}
