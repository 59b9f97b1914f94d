// SPDX-License-Identifier: Apache-2.0

package pagelane

import (
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/pkg/pagewire"
)

// TestSilentSource: the lane ends with an error that says so if the source takes requests and PINGs and answers
// neither. The same holds if the source stops in the middle of a message, because then both ends wait for each other.
func TestSilentSource(t *testing.T) {
	eachWay(t, func(t *testing.T, w pair) {
		for name, last := range map[string][]byte{"nothing": nil, "the beginning of a message": {0, 0, 1, 0, 0, 1, 2, 3}} {
			t.Run(name, func(t *testing.T) {
				got := clientOf(t, w, 20*time.Millisecond, askOne, func(p *rawPeer) {
					p.must(writeHeaders(p.Framer, false, acceptance...))
					if last != nil {
						p.must(p.WriteData(stream, false, last))
					}
				})
				select {
				case err := <-got:
					if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "has not answered") {
						t.Errorf("the client says %v", err)
					}
				case <-time.After(patience):
					t.Error("the client waits for ever")
				}
			})
		}
	})
}

// TestSlowSourceLives: as long as the source answers PINGs, a lane stays open, however late the reply to a request is.
func TestSlowSourceLives(t *testing.T) {
	eachWay(t, func(t *testing.T, w pair) {
		// This source answers its first request when the second has come. Until then it reads, and so it answers PINGs.
		address, _ := serve(t, w.server, true, func(s *Stream) error {
			if err := s.Accept(); err != nil {
				return err
			}
			var first, second pagewire.Request
			if err := errors.Join(s.Recv(&first), s.Recv(&second)); err != nil {
				return err
			}
			return s.Send(&pagewire.Reply{Runs: []pagewire.Run{
				{Length: first.Ranges[0].Length, Zero: true}, {Length: 1 << 30, Hole: true},
				{Length: second.Ranges[0].Length, Lost: true},
			}})
		})
		l := openTicked(t, address, w)
		got := make(chan error, 1)
		go func() { got <- l.Recv(new(pagewire.Reply)) }()
		if err := l.Send(pageAt(0)); err != nil {
			t.Fatal(err)
		}
		for range 5 {
			if err := tick(t, l, got); err != nil {
				t.Fatalf("it ends with %v", err)
			}
		}
		if err := l.Send(pageAt(0)); err != nil {
			t.Fatal(err)
		}
		if err := <-got; err != nil {
			t.Fatal(err)
		}
		if owed := l.keepalive.owed.Load(); owed != 0 {
			t.Errorf("%d bytes are owed when all is answered", owed)
		}
	})
}

// TestWaitingSourceLives: a source that waits for something else answers PINGs by Attend. Requests that come meanwhile
// are kept in order, and replies are sent although the reading goroutine is still in the middle of a read.
func TestWaitingSourceLives(t *testing.T) {
	eachWay(t, func(t *testing.T, w pair) {
		release, served := make(chan struct{}), make(chan struct{})
		address, _ := serve(t, w.server, true, func(s *Stream) error {
			defer close(served)
			if err := s.Accept(); err != nil {
				return err
			}
			var request pagewire.Request
			for offset := uint64(0); ; offset += 4096 {
				if err := s.Recv(&request); err != nil {
					return err
				}
				if got := request.Ranges[0].Offset; got != offset {
					t.Errorf("request for %#x, want %#x", got, offset)
				}
				if offset == 0 {
					stop := s.Attend()
					<-release
					stop()
				}
				if err := s.Send(&pagewire.Reply{Runs: []pagewire.Run{{Length: 4096, Zero: true}}}); err != nil {
					return err
				}
			}
		})
		l := openTicked(t, address, w)
		const pages = 3
		got := make(chan error, pages)
		go func() {
			var reply pagewire.Reply
			for range pages {
				got <- l.Recv(&reply)
			}
		}()
		for i := range uint64(pages) {
			if i == pages-1 { // this one is sent after the wait
				for range 5 {
					if err := tick(t, l, got); err != nil {
						t.Fatalf("it ends with %v", err)
					}
				}
				close(release)
				if err := <-got; err != nil { // no frame has come that would end the reader's read
					t.Fatal(err)
				}
			}
			if err := l.Send(pageAt(i * 4096)); err != nil {
				t.Fatal(err)
			}
		}
		for range pages - 1 {
			if err := <-got; err != nil {
				t.Fatal(err)
			}
		}
		l.Abort()
		<-served
	})
}

// pageAt returns a request for one page.
func pageAt(offset uint64) *pagewire.Request {
	return &pagewire.Request{Ranges: []pagewire.Range{{Offset: offset, Length: 4096}}}
}

// openTicked opens a lane whose keepalive sends a PING only when a test calls tick.
func openTicked(t *testing.T, address string, w pair) *Client {
	t.Helper()
	conn, err := Dial(t.Context(), address, w.client, nil)
	if err != nil {
		t.Fatal(err)
	}
	l, err := openWith(t.Context(), conn, nil, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// tick makes the keepalive send a PING and waits for the ACK. If the lane ends instead, tick returns the error that
// Recv sent to got.
func tick(t *testing.T, l *Client, got <-chan error) error {
	t.Helper()
	before, deadline := l.acks.Load(), time.Now().Add(patience)
	for l.keepalive.tick(); l.acks.Load() == before; time.Sleep(time.Millisecond) {
		select {
		case err := <-got:
			return err
		default:
		}
		if time.Now().After(deadline) {
			t.Fatal("the server does not answer")
		}
	}
	return nil
}

// TestImpatientServer: by default, a server of grpc-go allows a PING every five minutes, and two more after everything
// that it has sent. A lane that waits for nothing must live, however long it carries nothing, because it sends no
// PINGs. If the server is slow to answer, it closes the connection because of the PINGs. Then the error names the
// setting that the server lacks.
func TestImpatientServer(t *testing.T) {
	eachWay(t, func(t *testing.T, w pair) {
		server := grpc.NewServer(grpc.Creds(w.server), grpc.ForceServerCodecV2(pagewire.Codec{}), grpc.UnknownServiceHandler(
			func(_ any, s grpc.ServerStream) error {
				err := s.SendHeader(nil)
				var request pagewire.Request
				for err == nil {
					if err = s.RecvMsg(&request); err == nil && request.Ranges[0].Offset != unanswered {
						err = s.SendMsg(&pagewire.Reply{Runs: []pagewire.Run{{Length: request.Ranges[0].Length, Zero: true}}})
					}
				}
				return err
			}))
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		go func() { _ = server.Serve(listener) }()
		defer server.Stop()
		l := openTicked(t, listener.Addr().String(), w)
		for range 10 {
			for range 10 {
				l.keepalive.tick()
			}
			if err := errors.Join(l.Send(pageAt(0)), l.Recv(new(pagewire.Reply))); err != nil {
				t.Fatalf("a lane that carries little ends: %v", err)
			}
		}
		got := make(chan error, 1)
		go func() { got <- l.Recv(new(pagewire.Reply)) }()
		if err := l.Send(pageAt(unanswered)); err != nil {
			t.Fatal(err)
		}
		for answered := range 10 {
			err := tick(t, l, got)
			if err == nil {
				continue
			}
			if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "EnforcementPolicy") {
				t.Errorf("after %d answers: %v", answered, err)
			}
			return
		}
		t.Error("the server takes any number of PINGs")
	})
}

// unanswered is the offset of the page that the server of TestImpatientServer does not answer for.
const unanswered = 1 << 20

// TestBusyReceiverLives: while the receiver is busy with a reply, nobody reads ACKs, and their absence must not end the
// lane. While the receiver reads, it must.
func TestBusyReceiverLives(t *testing.T) {
	s, _, _ := sockets(t)
	to := &written{Conn: s}
	l := newClient(t.Context(), to, time.Hour)
	defer l.end()
	l.keepalive.owed.Store(4096)
	for range 3 {
		l.keepalive.tick()
	}
	if pings, ended := len(to.lengths), l.ctx.Err() != nil; pings != 3 || ended {
		t.Errorf("%d PINGs, ended %t", pings, ended)
	}
	l.keepalive.reading.Store(true)
	if l.keepalive.tick(); l.ctx.Err() == nil {
		t.Error("one that waits for an answer in vain is not ended")
	}
}
