// SPDX-License-Identifier: Apache-2.0

package card

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/migrated-vm/migrated/e2e/guest/pace"
	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/guest/stamp"
)

const (
	// patience is how long a card waits for an answer before it counts it as lost.
	patience = 500 * time.Millisecond
	largest  = 1400 // bytes of a message
	smallest = 64
)

// Config says what is done with the cards.
type Config struct {
	Cards int // their number; they are found by their hardware addresses
	Rate  int // messages a second and card; 0: as many as the client answers
}

// Validate returns an error if a parameter makes no sense.
func (c Config) Validate() error {
	if c.Cards < 0 || c.Cards > MaxCards || c.Rate < 0 {
		return fmt.Errorf("%d cards at %d messages a second: neither is negative, and there are no more than %d cards",
			c.Cards, c.Rate, MaxCards)
	}
	return nil
}

// A Set is all cards of the guest.
type Set struct{ cards []*card }

// Open turns the cards on with their addresses. From then on the kernel answers pings; messages begin with Run(true).
func Open(c Config) (*Set, error) {
	s := &Set{}
	for i := range c.Cards {
		name, vm, err := up(i)
		if err != nil {
			return nil, fmt.Errorf("network card %d: %w", i, err)
		}
		conn, err := net.DialUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(Addr(vm, i), 0)),
			net.UDPAddrFromAddrPort(netip.AddrPortFrom(Client(i), EchoPort)))
		if err != nil {
			return nil, fmt.Errorf("network card %d: %w", i, err)
		}
		s.cards = append(s.cards, newCard(name, i, c.Rate, conn))
	}
	for _, c := range s.cards {
		go c.pace.Run(c.step)
	}
	return s, nil
}

// Run makes the cards send or stop. It returns when they do.
func (s *Set) Run(on bool) {
	for _, c := range s.cards {
		c.pace.Set(on)
	}
}

// Report returns the counters of each card.
func (s *Set) Report() []report.Card {
	var all []report.Card
	for _, c := range s.cards {
		all = append(all, report.Card{
			Name: c.name, Sent: c.sent.Load(), Answered: c.answered.Load(), Lost: c.lost.Load(),
			Wrong: c.wrong.Load(), Errors: c.errs.Load(), MaxUS: c.slowest.Take().Microseconds(),
		})
	}
	return all
}

// A card sends one message at a time.
type card struct {
	name   string
	number int
	conn   net.Conn // to the client
	pace   *pace.Worker

	sent, answered, lost, wrong, errs atomic.Uint64
	slowest                           pace.Slowest

	// Owned by step.
	seq    uint32
	answer [largest + 1]byte
}

func newCard(name string, number, rate int, conn net.Conn) *card {
	var interval time.Duration
	if rate > 0 {
		interval = time.Second / time.Duration(rate)
	}
	return &card{name: name, number: number, conn: conn, pace: pace.New(interval)}
}

// step exchanges one message. It pauses after a failure, because a card that cannot send fails at once.
func (c *card) step() {
	if c.exchange() {
		time.Sleep(time.Millisecond)
	}
}

// exchange sends a message and waits until it comes back. The message is a stamp: all its bytes follow from the card
// and the number of the message.
func (c *card) exchange() (failed bool) {
	c.seq++
	var page stamp.Page
	page.Write(stamp.Random, c.seq, uint32(c.number+1))
	message := unsafe.Slice((*byte)(unsafe.Pointer(&page)), smallest+c.seq*37%(largest-smallest))
	began := time.Now()
	if _, err := c.conn.Write(message); err != nil {
		c.errs.Add(1)
		return true
	}
	c.sent.Add(1)
	for {
		if err := c.conn.SetReadDeadline(began.Add(patience)); err != nil {
			c.errs.Add(1)
			return true
		}
		n, err := c.conn.Read(c.answer[:])
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			c.lost.Add(1)
			return false
		case err != nil:
			c.errs.Add(1)
			return true
		}
		if n >= 8 && binary.LittleEndian.Uint32(c.answer[:]) != c.seq {
			continue // the answer to a message that was counted as lost
		}
		if !bytes.Equal(c.answer[:n], message) {
			c.wrong.Add(1)
			return false
		}
		c.answered.Add(1)
		c.slowest.Note(time.Since(began))
		return false
	}
}
