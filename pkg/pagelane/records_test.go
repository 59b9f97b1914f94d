// SPDX-License-Identifier: Apache-2.0

package pagelane

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/pkg/pagelane/tcpkeepalive"
	"github.com/migrated-vm/migrated/pkg/pagewire"
)

// written is a connection that records the length of each Write. It forwards them to Conn, if there is one, unless err
// is set.
type written struct {
	net.Conn
	mu      sync.Mutex
	lengths []int
	err     error
}

func (w *written) NetConn() net.Conn { return w.Conn }

func (w *written) Write(p []byte) (int, error) {
	w.mu.Lock()
	w.lengths = append(w.lengths, len(p))
	w.mu.Unlock()
	if w.Conn == nil || w.err != nil {
		return len(p), w.err
	}
	return w.Conn.Write(p)
}

// diverted is a connection whose writes go to memory as long as to is set.
type diverted struct {
	net.Conn
	to *bytes.Buffer
}

func (d *diverted) Write(p []byte) (int, error) {
	if d.to != nil {
		return d.to.Write(p)
	}
	return d.Conn.Write(p)
}

// TestGathering: records of one message are written together, the last of them is never held back, and other records
// are not held back either, in whatever order tls.Conn writes them.
func TestGathering(t *testing.T) {
	const full, more, batch = recordPlain, fullRecord - recordPlain, recordBatch / fullRecord * fullRecord
	for name, c := range map[string]struct {
		announced int
		records   []int // bytes of content, in the order in which tls.Conn writes them
		want      []int // bytes of each Write
	}{
		"nothing announced": {0, []int{full, full, 1}, []int{fullRecord, fullRecord, 1 + more}},
		"full records":      {2 * full, []int{full, full}, []int{2 * fullRecord}},
		"the last is short": {2*full + 1, []int{full, full, 1}, []int{2*fullRecord + 1 + more}},
		"more than a batch": {9 * full, slices.Repeat([]int{full}, 9), []int{batch, 2 * fullRecord}},
		"a PING before":     {2*full + 1, []int{17, full, full, 1}, []int{17 + more, 2 * fullRecord, 1 + more}},
		"a PING after":      {2 * full, []int{full, full, 17}, []int{2 * fullRecord, 17 + more}},
		"a full one before": {2 * full, []int{full, full, full}, []int{2 * fullRecord, fullRecord}},
		"short ones first": {
			3 * full, []int{1000, 2000, full, full, full - 3000}, []int{1000 + more, 2000 + more, 3*fullRecord - 3000},
		},
	} {
		t.Run(name, func(t *testing.T) {
			to := &written{}
			r := &records{socket: &socket{Conn: to}}
			r.announced.Store(int64(c.announced))
			for i, content := range c.records {
				if n, err := r.Write(make([]byte, content+more)); n != content+more || err != nil {
					t.Fatalf("record %d: %d, %v", i, n, err)
				}
			}
			if !slices.Equal(to.lengths, c.want) {
				t.Errorf("written are %v, want %v", to.lengths, c.want)
			}
		})
	}
}

// TestGatheringFails: a record that is held back was "written" without an error. The error of writing it is returned
// for the record that is written together with it.
func TestGatheringFails(t *testing.T) {
	to := &written{err: net.ErrClosed}
	r := &records{socket: &socket{Conn: to}}
	r.announced.Store(2 * recordPlain)
	if _, err := r.Write(make([]byte, fullRecord)); err != nil {
		t.Errorf("one that is kept: %v", err)
	}
	if n, err := r.Write(make([]byte, fullRecord)); n != 0 || !errors.Is(err, net.ErrClosed) {
		t.Errorf("the last one: %d, %v", n, err)
	}
}

// ends connects an end of a lane with TLS, still in the poller, to a tls.Conn that has nothing of this package.
func ends(t *testing.T) (lane *encrypted, peer *tls.Conn, beneath *written) {
	t.Helper()
	w := secure(t)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	accepted := make(chan net.Conn, 1)
	go func() {
		c, err := listener.Accept()
		if err == nil {
			c, _, err = w.server.ServerHandshake(&diverted{Conn: c})
		}
		if err != nil {
			t.Error(err)
		}
		accepted <- c
	}()
	raw, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	beneath = &written{Conn: raw}
	s := &socket{Conn: beneath}
	r := &records{socket: s}
	c, _, err := w.client.ClientHandshake(t.Context(), listener.Addr().String(), r)
	if err != nil {
		t.Fatal(err)
	}
	lane, isTLS := r.laneConn(c).(*encrypted)
	peer, ok := (<-accepted).(*tls.Conn)
	if !isTLS || !ok {
		t.Fatalf("the lane is a %T", c)
	}
	t.Cleanup(func() { lane.Close(); peer.Close() })
	if err := peer.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return lane, peer, beneath
}

// TestFewWrites: the records of a run are written by few system calls.
func TestFewWrites(t *testing.T) {
	lane, peer, beneath := ends(t)
	beneath.lengths = nil
	sent := make(chan error, 1)
	run := bytes.Repeat([]byte("run "), 128<<10)
	go func() {
		_, err := lane.Write(run)
		sent <- err
	}()
	got := make([]byte, len(run))
	if _, err := io.ReadFull(peer, got); err != nil || !bytes.Equal(got, run) {
		t.Fatalf("what comes is another thing, %v", err)
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	if n := len(beneath.lengths); n != 5 {
		t.Errorf("512 KiB are written by %d calls, want 5", n)
	}
}

// TestWritersMeet: one goroutine writes messages, another one PINGs, as on a lane. Their lengths are around those of
// one or several records. All of them arrive whole, although nothing is written afterwards.
func TestWritersMeet(t *testing.T) {
	lane, peer, _ := ends(t)
	message := func(kind byte, length int) []byte {
		m := bytes.Repeat([]byte{kind}, length)
		binary.BigEndian.PutUint32(m[1:], uint32(length))
		return m
	}
	var lengths []int
	for n := 1; n <= 17; n++ {
		lengths = append(lengths, n*recordPlain-1, n*recordPlain, n*recordPlain+1)
	}
	const others = 1000
	var writers sync.WaitGroup
	writers.Go(func() {
		for _, n := range lengths {
			if _, err := lane.Write(message('m', n)); err != nil {
				t.Error(err)
			}
		}
	})
	writers.Go(func() {
		for i := range others {
			if _, err := lane.Write(message('p', 17+i%2*(recordPlain-17))); err != nil {
				t.Error(err)
			}
		}
	})
	for range len(lengths) + others {
		head := make([]byte, 5)
		if _, err := io.ReadFull(peer, head); err != nil {
			t.Fatal(err)
		}
		rest := make([]byte, binary.BigEndian.Uint32(head[1:])-5)
		if _, err := io.ReadFull(peer, rest); err != nil {
			t.Fatal(err)
		}
		if want := bytes.Repeat(head[:1], len(rest)); head[0] != 'm' && head[0] != 'p' || !bytes.Equal(rest, want) {
			t.Fatalf("a message %q of %d bytes has another one in it", head[0], len(rest)+5)
		}
	}
	writers.Wait()
}

// TestCloseWhileWriting: Close ends a Write to a peer that does not read.
func TestCloseWhileWriting(t *testing.T) {
	for _, left := range []bool{false, true} {
		t.Run(fmt.Sprintf("left the poller %t", left), func(t *testing.T) {
			lane, peer, _ := ends(t)
			if left {
				if err := lane.records.leavePoller(); err != nil {
					t.Fatal(err)
				}
			}
			wrote := make(chan error, 1)
			go func() {
				_, err := lane.Write(make([]byte, 256<<20))
				wrote <- err
			}()
			if _, err := peer.Read(make([]byte, 1)); err != nil { // from here on, the goroutine is in Write
				t.Fatal(err)
			}
			closed := make(chan error, 1)
			go func() { closed <- lane.Close() }()
			for _, done := range []chan error{closed, wrote} {
				select {
				case err := <-done:
					if done == wrote && err == nil {
						t.Error("all was written to a peer that takes nothing")
					}
				case <-time.After(patience):
					t.Fatal("it waits for ever")
				}
			}
		})
	}
}

// TestServerClosesWriter: Close of a server ends the Send of a handler whose client does not read.
func TestServerClosesWriter(t *testing.T) {
	eachWay(t, func(t *testing.T, w pair) {
		served := make(chan error, 1)
		address, lanes := serve(t, w.server, true, func(s *Stream) error {
			if err := s.Accept(); err != nil {
				return err
			}
			var reply pagewire.Reply
			for {
				reply.Lease(pagewire.MaxData)
				reply.Runs = append(reply.Runs[:0], pagewire.Run{Length: pagewire.MaxData})
				if err := s.Send(&reply); err != nil {
					served <- err
					return err
				}
			}
		})
		l, err := open(t, address, w.client, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Recv(new(pagewire.Reply)); err != nil {
			t.Fatal(err)
		}
		lanes.Close() // waits for the handler
		if err := <-served; status.Code(err) != codes.Unavailable {
			t.Errorf("the lane ended with %v", err)
		}
	})
}

// TestOddRecords: a message may be split into records of any length. Read returns all of it, and does not wait for more
// than the message.
func TestOddRecords(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	run := pagewire.Run{Offset: 7, Length: 300 << 10}
	e, err := (&pagewire.Reply{Data: bytes.Repeat([]byte{7}, 300<<10), Runs: []pagewire.Run{run}}).Encode()
	if err != nil {
		t.Fatal(err)
	}
	defer e.Release()
	var frame bytes.Buffer
	if err := http2.NewFramer(&frame, nil).WriteData(stream, false, prefixed(e.Bytes[pagewire.Room:])); err != nil {
		t.Fatal(err)
	}
	const messages = 20
	for _, most := range []int{100, 1448, 5000, 20000, 100000} {
		t.Run(fmt.Sprint(most), func(t *testing.T) {
			next := make(chan struct{}, 1)
			got := clientOf(t, secure(t), tcpkeepalive.Quiet, func(l *Client) error {
				for range messages {
					var reply pagewire.Reply
					if err := l.Recv(&reply); err != nil {
						return err
					}
					if len(reply.Data) != 300<<10 || len(bytes.TrimLeft(reply.Data, "\x07")) != 0 {
						return errors.New("another thing was received")
					}
					next <- struct{}{} // the peer sends the next message after this
				}
				return nil
			}, func(p *rawPeer) {
				p.must(writeHeaders(p.Framer, false, acceptance...))
				for range messages {
					p.must(p.SetDeadline(time.Now().Add(patience))) // tens of thousands of records are slow with -race
					for rest := frame.Bytes(); len(rest) > 0; {
						n := min(1+random.IntN(most), len(rest))
						_, err := p.Conn.Write(rest[:n])
						p.must(err)
						rest = rest[n:]
					}
					select {
					case <-next:
					case <-time.After(patience):
						t.Fatal("the client waits for what will not come")
					}
				}
			})
			if err := <-got; err != nil {
				t.Error(err)
			}
		})
	}
}

// TestReadsOfAnyLength: Read works with buffers that are shorter and longer than a record, or than the rest of one.
func TestReadsOfAnyLength(t *testing.T) {
	lane, peer, _ := ends(t)
	said := make([]byte, 4<<20)
	_, _ = rand.NewChaCha8([32]byte{}).Read(said) // returns no error
	go func() {
		if _, err := peer.Write(said); err != nil {
			t.Error(err)
		}
	}()
	random := rand.New(rand.NewPCG(3, 4))
	p := make([]byte, 40000)
	for rest := said; len(rest) > 0; {
		n, err := lane.Read(p[:1+random.IntN(len(p))])
		if err != nil || !bytes.Equal(p[:n], rest[:n]) {
			t.Fatalf("%d bytes, %d before the end, are others: %v", n, len(rest), err)
		}
		rest = rest[n:]
	}
}
