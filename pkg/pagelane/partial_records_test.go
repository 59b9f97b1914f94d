// SPDX-License-Identifier: Apache-2.0

package pagelane

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/pkg/pagewire"
)

// relay forwards connections to target, and returns its address. What the server sends goes through forward.
func relay(t *testing.T, target string, forward func(to net.Conn, p []byte) error) (address string) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var copies sync.WaitGroup
	var mu sync.Mutex
	var open []net.Conn
	copies.Go(func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", target)
			if err != nil {
				client.Close()
				return
			}
			mu.Lock()
			open = append(open, client, server)
			mu.Unlock()
			copies.Go(func() {
				_, _ = io.Copy(server, client)
				server.Close()
			})
			copies.Go(func() {
				defer client.Close()
				p := make([]byte, 64<<10)
				for {
					n, err := server.Read(p)
					if err != nil || forward(client, p[:n]) != nil {
						return
					}
				}
			})
		}
	})
	t.Cleanup(func() {
		listener.Close()
		mu.Lock()
		for _, c := range open {
			c.Close()
		}
		mu.Unlock()
		copies.Wait()
	})
	return listener.Addr().String()
}

// TestTrickle: a reply arrives byte by byte.
func TestTrickle(t *testing.T) {
	w := secure(t)
	target, _ := serve(t, w.server, true, func(s *Stream) error { return echo(s) })
	address := relay(t, target, func(to net.Conn, p []byte) error {
		for i := range p {
			if _, err := to.Write(p[i : i+1]); err != nil {
				return err
			}
		}
		return nil
	})
	l, err := open(t, address, w.client, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i, length := range []uint32{4096, 16 << 10, 60 << 10, 4096} {
		fetch(t, l, uint64(i), length)
	}
}

// stalling forwards so many bytes of what the server sends, and the rest when resume is closed.
type stalling struct {
	budget atomic.Int64 // negative: everything is forwarded
	resume chan struct{}
}

func (s *stalling) forward(to net.Conn, p []byte) error {
	if budget := s.budget.Load(); budget >= 0 {
		n := min(int(budget), len(p))
		s.budget.Add(-int64(n))
		if _, err := to.Write(p[:n]); err != nil {
			return err
		}
		if p = p[n:]; len(p) > 0 {
			<-s.resume
			s.budget.Store(-1)
		}
	}
	_, err := to.Write(p)
	return err
}

// TestStallWithinRecord: the connection stops in the middle of a record, or of a record's header. If the rest does not
// come, the keepalive ends the lane. If it does, the lane goes on.
func TestStallWithinRecord(t *testing.T) {
	w := secure(t)
	target, _ := serve(t, w.server, true, func(s *Stream) error { return echo(s) })
	for _, bytes := range []int64{0, 1, recordHeader, recordHeader + 1, 3000, fullRecord, fullRecord + 3, 60000} {
		t.Run(fmt.Sprint(bytes), func(t *testing.T) {
			begin := func() (*Client, func()) {
				s := &stalling{resume: make(chan struct{})}
				s.budget.Store(-1)
				end := sync.OnceFunc(func() { close(s.resume) })
				c, err := Dial(t.Context(), relay(t, target, s.forward), w.client, nil)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(end) // runs before the relay's cleanup, which waits for forward
				l, err := openWith(t.Context(), c, nil, time.Hour)
				if err != nil {
					t.Fatal(err)
				}
				fetch(t, l, 1, 4096)
				s.budget.Store(bytes)
				run := pagewire.Range{Block: 3, Offset: 9, Length: 256 << 10}
				if err := l.Send(&pagewire.Request{Ranges: []pagewire.Range{run}}); err != nil {
					t.Fatal(err)
				}
				for s.budget.Load() > 0 {
					time.Sleep(time.Millisecond) // until forward waits for resume
				}
				return l, end
			}
			l, _ := begin()
			got := make(chan error, 1)
			go func() { got <- l.Recv(new(pagewire.Reply)) }()
			for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
				select {
				case err := <-got:
					if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "has not answered") {
						t.Errorf("of one that stalls for ever: %v", err)
					}
				default:
					if time.Now().After(deadline) {
						t.Fatal("the client waits for ever")
					}
					l.keepalive.tick()
					continue
				}
				break
			}
			l, resume := begin()
			resume()
			expect(t, l, 9, 256<<10)
			fetch(t, l, 2, 4096)
		})
	}
}

// TestCutWithinRecord: if the connection ends within a record, by FIN or by RST, Recv returns codes.Unavailable.
func TestCutWithinRecord(t *testing.T) {
	w := secure(t)
	target, _ := serve(t, w.server, true, func(s *Stream) error { return echo(s) })
	for name, cut := range map[string]func(*net.TCPConn) error{
		"closed":      func(c *net.TCPConn) error { return c.Close() },
		"half-closed": func(c *net.TCPConn) error { return c.CloseWrite() },
		"reset":       func(c *net.TCPConn) error { return errors.Join(c.SetLinger(0), c.Close()) },
	} {
		t.Run(name, func(t *testing.T) {
			var armed atomic.Bool
			address := relay(t, target, func(to net.Conn, p []byte) error {
				if !armed.Load() {
					_, err := to.Write(p)
					return err
				}
				_, err := to.Write(p[:1000])
				if err = errors.Join(err, cut(to.(*net.TCPConn))); name != "half-closed" {
					return errors.Join(err, io.EOF)
				}
				return err
			})
			l, err := open(t, address, w.client, nil)
			if err != nil {
				t.Fatal(err)
			}
			fetch(t, l, 1, 4096)
			armed.Store(true)
			if err := l.Send(&pagewire.Request{Ranges: []pagewire.Range{{Length: 64 << 10}}}); err != nil {
				t.Fatal(err)
			}
			err = l.Recv(new(pagewire.Reply))
			if status.Code(err) != codes.Unavailable || name == "reset" != strings.Contains(err.Error(), "reset by peer") {
				t.Errorf("the client is told %v", err)
			}
		})
	}
}

// TestNoRecord: a record whose header gives an impossible length is refused at once, before its content comes.
func TestNoRecord(t *testing.T) {
	lane, peer, _ := ends(t)
	if _, err := peer.NetConn().Write([]byte{23, 3, 3, 0xff, 0xff, 0}); err != nil {
		t.Fatal(err)
	}
	got := make(chan error, 1)
	go func() {
		_, err := lane.Read(make([]byte, recordPlain))
		got <- err
	}()
	select {
	case err := <-got:
		if !strings.Contains(err.Error(), "oversized record") {
			t.Errorf("the reader says %v", err)
		}
	case <-time.After(patience):
		t.Error("the reader waits for a record of 64 KiB")
	}
}

// TestDeadlineWithinRecord: a deadline ends a Read that waits for the rest of a record. A later Read returns the
// record.
func TestDeadlineWithinRecord(t *testing.T) {
	for _, left := range []bool{false, true} {
		t.Run(fmt.Sprintf("left the poller %t", left), func(t *testing.T) {
			lane, peer, _ := ends(t)
			raw := peer.NetConn().(*diverted)
			if left {
				if err := lane.records.leavePoller(); err != nil {
					t.Fatal(err)
				}
			}
			// The peer encrypts a record into memory. The test sends it in two pieces.
			var record bytes.Buffer
			raw.to = &record
			if _, err := peer.Write(bytes.Repeat([]byte{1}, recordPlain)); err != nil {
				t.Fatal(err)
			}
			if _, err := raw.Conn.Write(record.Next(3000)); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, recordPlain)
			lane.expect(recordPlain)
			for range 2 {
				if err := lane.SetReadDeadline(time.Now().Add(20 * time.Millisecond)); err != nil {
					t.Fatal(err)
				}
				if n, err := io.ReadFull(lane, got); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Fatalf("%d bytes of a part of a record, %v", n, err)
				}
			}
			if err := lane.SetReadDeadline(time.Time{}); err != nil {
				t.Fatal(err)
			}
			if _, err := raw.Conn.Write(record.Bytes()); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(lane, got); err != nil || !bytes.Equal(got, bytes.Repeat([]byte{1}, recordPlain)) {
				t.Errorf("the record is another one, %v", err)
			}
		})
	}
}
