// SPDX-License-Identifier: Apache-2.0

package lab_test

import (
	"errors"
	"net"
	"os"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/e2e/lab"
)

func TestLinkCutOneWay(t *testing.T) {
	l := newLinked(t, lab.Link{Delay: 100 * time.Microsecond})
	a, b := connect(t, l)
	exchange(t, a, b)
	exchange(t, b, a)

	// The request arrives, the answer does not.
	l.BA.SetCut(true)
	exchange(t, a, b)
	if _, err := b.Write([]byte{1}); err != nil {
		t.Fatal(err)
	}
	// At least two packets meet the cut: the first acknowledges the request, perhaps together with the answer.
	await(t, l.BA, "the answer meets the cut", func(s lab.Stats) bool { return s.Cut >= 2 })
	noneArrives(t, a)
	l.BA.SetCut(false)
	receive(t, a)

	// The request does not arrive.
	l.AB.SetCut(true)
	if _, err := a.Write([]byte{1}); err != nil {
		t.Fatal(err)
	}
	await(t, l.AB, "the request meets the cut", func(s lab.Stats) bool { return s.Cut > 0 })
	noneArrives(t, b)
	l.BA.SetCut(true)
	l.AB.SetCut(false)
	receive(t, b)
	l.BA.SetCut(false)
	exchange(t, b, a)
}

// noneArrives checks that nothing arrives on a connection. It waits only for a short time.
func noneArrives(t *testing.T, c net.Conn) {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if n, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("over a wire that is cut came %d bytes, %v", n, err)
	}
}

// TestLinkCutWithPacketsOnIt checks that a cut loses the packets on the wire and
// those sent meanwhile, even if the wire is mended before they would have arrived.
func TestLinkCutWithPacketsOnIt(t *testing.T) {
	l := newLinked(t, lab.Link{Delay: 2 * time.Second})
	a, b := datagrams(t, l)
	send := func(number byte) {
		t.Helper()
		before := l.AB.Stats()
		if _, err := a.Write([]byte{number}); err != nil {
			t.Fatal(err)
		}
		await(t, l.AB, "the packet is seen", func(s lab.Stats) bool {
			return s.Packets > before.Packets || s.Cut > before.Cut
		})
	}
	send(1)
	l.AB.SetCut(true)
	send(2)
	l.AB.SetCut(false)
	send(3)
	got := make([]byte, 1)
	bound(t, b)
	if _, err := b.Read(got); err != nil || got[0] != 3 {
		t.Errorf("after the cut arrived packet %d, %v", got[0], err)
	}
	if s := l.AB.Stats(); s.Packets != 2 || s.Cut != 2 {
		t.Errorf("of 3 packets, 2 on the wire and 2 cut off: %+v", s)
	}
}

// TestLinkPulled pulls the cable and plugs it in again. Data that was sent meanwhile
// arrives, because TCP sends it again.
func TestLinkPulled(t *testing.T) {
	l := newLinked(t, lab.Link{})
	a, b := connect(t, l)
	exchange(t, a, b)
	if _, err := l.B.Run(t.Context(), "ip", "link", "set", "cable", "down"); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Write([]byte{1}); err != nil {
		t.Fatal(err)
	}
	await(t, l.AB, "the packet is refused", func(s lab.Stats) bool { return s.Refused > 0 })
	if err := l.SetCable(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	if err := l.SetCable(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	receive(t, b)
	exchange(t, b, a)
}
