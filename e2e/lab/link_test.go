// SPDX-License-Identifier: Apache-2.0

package lab_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/e2e/lab"
)

// patience limits each wait of a test, and how long one transfer takes.
const patience = time.Minute

// newLinked makes a lab with an emulated link.
func newLinked(t *testing.T, link lab.Link) *lab.Lab {
	t.Helper()
	needRoot(t)
	l, err := lab.NewWithLink(t.Context(), link)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("end of the lab: %v", err)
		}
	})
	return l
}

// connect returns the two ends of a TCP connection from host A to host B.
func connect(t *testing.T, l *lab.Lab) (a, b net.Conn) {
	t.Helper()
	var listener net.Listener
	err := l.B.InNetwork(func() (err error) {
		listener, err = net.Listen("tcp4", net.JoinHostPort(l.B.Addr, "0"))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	err = l.A.InNetwork(func() (err error) {
		a, err = net.DialTimeout("tcp4", listener.Addr().String(), patience)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if b, err = listener.Accept(); err != nil {
		t.Fatal(err)
	}
	for _, c := range []net.Conn{a, b} {
		t.Cleanup(func() { c.Close() })
	}
	return a, b
}

// datagrams returns a socket of host A that is connected to a socket of host B, and that socket.
func datagrams(t *testing.T, l *lab.Lab) (a, b *net.UDPConn) {
	t.Helper()
	err := l.B.InNetwork(func() (err error) {
		b, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.ParseIP(l.B.Addr)})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	err = l.A.InNetwork(func() (err error) {
		a, err = net.DialUDP("udp4", nil, b.LocalAddr().(*net.UDPAddr))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	return a, b
}

// bound gives the next read from c patience.
func bound(t *testing.T, c net.Conn) {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
}

// await waits until a wire's statistics are as wanted, and returns them.
func await(t *testing.T, w *lab.Wire, what string, wanted func(lab.Stats) bool) lab.Stats {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		s := w.Stats()
		if wanted(s) {
			return s
		}
		if time.Now().After(deadline) {
			t.Fatalf("not in %v: %s: %+v", patience, what, s)
		}
	}
}

// exchange sends a byte from one end of a connection to the other.
func exchange(t *testing.T, from, to net.Conn) {
	t.Helper()
	if _, err := from.Write([]byte{1}); err != nil {
		t.Fatal(err)
	}
	receive(t, to)
}

func receive(t *testing.T, c net.Conn) {
	t.Helper()
	bound(t, c)
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
}

func TestLinkDelay(t *testing.T) {
	l := newLinked(t, lab.Link{})
	a, b := connect(t, l)
	for _, delay := range []time.Duration{0, 50 * time.Microsecond, 200 * time.Microsecond, 5 * time.Millisecond} {
		l.AB.Set(lab.Link{Delay: delay})
		l.BA.Set(lab.Link{Delay: delay})
		var took []time.Duration
		for range 100 {
			start := time.Now()
			exchange(t, a, b)
			exchange(t, b, a)
			took = append(took, time.Since(start))
		}
		slices.Sort(took)
		t.Logf("one way %v: round trip from %v on, median %v", delay, took[0], took[len(took)/2])
		if took[0] < 2*delay {
			t.Errorf("one way %v: a round trip took only %v", delay, took[0])
		}
	}
}

func TestLinkRate(t *testing.T) {
	l := newLinked(t, lab.Link{Delay: 100 * time.Microsecond})
	for rate, size := range map[int64]int64{50e6: 2 << 20, 1e9: 40 << 20} {
		l.AB.Set(lab.Link{Rate: rate, Delay: 100 * time.Microsecond})
		before := l.AB.Stats()
		a, b := connect(t, l)
		start := time.Now()
		sent := make(chan error, 1)
		go func() {
			_, err := a.Write(make([]byte, size))
			sent <- errors.Join(err, a.Close())
		}()
		bound(t, b)
		if n, err := io.Copy(io.Discard, b); n != size || err != nil {
			t.Fatalf("received %d of %d bytes: %v", n, size, err)
		}
		took := time.Since(start)
		if err := <-sent; err != nil {
			t.Fatal(err)
		}
		after := l.AB.Stats()
		wire := after.Bytes - before.Bytes
		t.Logf("%d Mbit/s: %d MiB in %v, %.0f Mbit/s, %.3f bytes on the wire for one; dropped %d packets",
			rate/1e6, size>>20, took, float64(size)*8/took.Seconds()/1e6,
			float64(wire)/float64(size), after.Dropped-before.Dropped)
		// At most 1460 of the 1538 bytes of a segment are TCP's payload.
		least := time.Duration(float64(size) * 1538 / 1460 * 8e9 / float64(rate))
		if took < least {
			t.Errorf("%d bytes at %d bit/s took only %v; their segments take %v", size, rate, took, least)
		}
		if wire < size*1538/1460 || wire > size*2 {
			t.Errorf("%d bytes took %d bytes on the wire", size, wire)
		}
	}
}

func TestLinkLoss(t *testing.T) {
	const packets, payload = 3000, 100
	l := newLinked(t, lab.Link{})
	a, b := datagrams(t, l)
	// arrived sends packets one by one and returns the numbers of those that arrived.
	arrived := func(seed uint64) (numbers []int) {
		l.AB.Set(lab.Link{Loss: 0.1, Seed: seed})
		datagram := make([]byte, payload)
		for i := range packets {
			before := l.AB.Stats()
			datagram[0], datagram[1] = byte(i>>8), byte(i)
			if _, err := a.Write(datagram); err != nil {
				t.Fatal(err)
			}
			after := before
			for after.Packets == before.Packets {
				after = l.AB.Stats()
			}
			if after.Bytes-before.Bytes != payload+28+38 { // 28 for IP and UDP, 38 for Ethernet
				t.Fatalf("a datagram of %d bytes took %d on the wire", payload, after.Bytes-before.Bytes)
			}
			if after.Lost == before.Lost {
				bound(t, b)
				if _, err := b.Read(datagram); err != nil {
					t.Fatal(err)
				}
				numbers = append(numbers, int(datagram[0])<<8|int(datagram[1]))
			}
		}
		return numbers
	}
	first, other := arrived(1), arrived(2)
	t.Logf("loss 10 %%: %d and %d of %d arrived", len(first), len(other), packets)
	if lost := packets - len(first); lost < packets/20 || lost > packets/5 {
		t.Errorf("lost %d of %d packets", lost, packets)
	}
	if !slices.Equal(first, arrived(1)) {
		t.Error("the same seed lost other packets")
	}
	if slices.Equal(first, other) {
		t.Error("another seed lost the same packets")
	}
}

func TestLinkQueueIsBounded(t *testing.T) {
	const packets = 400 // the device itself queues up to 500 while the wire's thread waits
	const payload, wire = 1400, 1400 + 28 + 38
	const rate, queue = 10e6, 10 * time.Millisecond
	l := newLinked(t, lab.Link{Rate: rate})
	a, _ := datagrams(t, l)
	start := time.Now()
	for range packets {
		if _, err := a.Write(make([]byte, payload)); err != nil {
			t.Fatal(err)
		}
	}
	s := await(t, l.AB, "what was sent is on the wire or dropped",
		func(s lab.Stats) bool { return s.Packets+s.Dropped == packets })
	took := time.Since(start)
	t.Logf("%d packets in %v: %+v", packets, took, s)
	if limit := rate/8*(took+queue).Seconds() + 2*wire; float64(s.Bytes) > limit {
		t.Errorf("%d bytes were accepted in %v; the wire and its queue take %.0f", s.Bytes, took, limit)
	}
	if s.Packets < int64(rate/8*queue.Seconds()/wire) {
		t.Errorf("the queue took only %d packets", s.Packets)
	}
}

func TestLinkMemoryIsBounded(t *testing.T) {
	const payload, memory = 1400, 64 << 20
	l := newLinked(t, lab.Link{Delay: time.Hour})
	a, _ := datagrams(t, l)
	datagram := make([]byte, payload)
	deadline := time.Now().Add(patience)
	for l.AB.Stats().Dropped == 0 && time.Now().Before(deadline) {
		if _, err := a.Write(datagram); err != nil {
			t.Fatal(err)
		}
	}
	s := l.AB.Stats()
	if size := s.Packets * (payload + 28); s.Dropped == 0 || size > memory || size < memory*9/10 {
		t.Errorf("a wire took %d bytes, not 64 MiB: %+v", size, s)
	}
}

// TestLinkCarriesEveryByte checks the bytes themselves. No checksum shows that a
// wire mixes up its packets: the kernel leaves checksums to a network card, and there is none.
func TestLinkCarriesEveryByte(t *testing.T) {
	const blocks = 150 // more than fit into a wire's memory
	l := newLinked(t, lab.Link{Delay: 3 * time.Millisecond})
	a, b := connect(t, l)
	block := make([]byte, 1<<20)
	random := rand.New(rand.NewPCG(1, 1))
	for i := range block {
		block[i] = byte(random.Uint32())
	}
	sent := make(chan error, 1)
	go func() {
		for range blocks {
			if _, err := a.Write(block); err != nil {
				sent <- err
				return
			}
		}
		sent <- nil
	}()
	got := make([]byte, len(block))
	for i := range blocks {
		bound(t, b)
		if _, err := io.ReadFull(b, got); err != nil {
			t.Fatalf("block %d: %v", i, err)
		}
		if !bytes.Equal(got, block) {
			t.Fatalf("block %d arrived otherwise than it was sent", i)
		}
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	t.Logf("%d MiB: %+v", blocks, l.AB.Stats())
}

func TestLinkAllocatesNothing(t *testing.T) {
	l := newLinked(t, lab.Link{Rate: 1e9, Delay: 50 * time.Microsecond})
	a, b := datagrams(t, l)
	datagram := make([]byte, 1000)
	bound(t, b) // once for all, because setting a deadline may allocate
	allocs := testing.AllocsPerRun(200, func() {
		if _, err := a.Write(datagram); err != nil {
			t.Fatal(err)
		}
		if _, err := b.Read(datagram); err != nil {
			t.Fatal(err)
		}
	})
	if allocs != 0 {
		t.Errorf("%v allocations a packet", allocs)
	}
}
