// SPDX-License-Identifier: Apache-2.0

package card

import (
	"errors"
	"net"
	"testing"
)

func TestAddresses(t *testing.T) {
	if vm, card, err := Of(MAC(3, 5)); vm != 3 || card != 5 || err != nil {
		t.Errorf("card %d of VM %d, %v", card, vm, err)
	}
	if _, _, err := Of(net.HardwareAddr{0x52, 0x54, 0, 0x12, 0x34, 0x56}); !errors.Is(err, ErrForeign) {
		t.Errorf("a card of another VM: %v", err)
	}
	if a, c := Addr(MaxVMs-1, 5).String(), Client(5).String(); a != "10.78.5.209" || c != "10.78.5.1" {
		t.Errorf("addresses %s, %s", a, c)
	}
}

// TestExchange: a client sends back messages, leaves one out, and changes a byte of one.
func TestExchange(t *testing.T) {
	client, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	conn, err := net.Dial("udp4", client.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	const good, silent, changed = 5, 1, 1
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 2000)
		for i := range good + silent + changed {
			n, from, err := client.ReadFromUDP(b)
			if err != nil {
				t.Error(err)
				return
			}
			switch {
			case i == good:
				continue
			case i > good:
				b[n-1] ^= 1
			}
			if _, err := client.WriteToUDP(b[:n], from); err != nil {
				t.Error(err)
			}
		}
	}()
	c := newCard("eth0", 0, 0, conn)
	for range good + silent + changed {
		c.exchange()
	}
	<-done
	s := Set{cards: []*card{c}}
	got := s.Report()[0]
	got.MaxUS = 0
	want := got
	want.Sent, want.Answered, want.Lost, want.Wrong, want.Errors = good+silent+changed, good, silent, changed, 0
	if got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}
