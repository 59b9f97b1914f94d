// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/e2e/guest/card"
)

// lastAnswers is how long Stop waits for answers that are still missing.
const lastAnswers = 5 * time.Second

// Pings is the result of pinging one network card of a VM.
type Pings struct {
	Sent, Answered, Lost int
	// LongestGap is the longest time without an answer: between the arrivals of two answers, or after
	// the last one. It began at GapBegan.
	LongestGap time.Duration
	GapBegan   time.Time
	// Answers are the times at which answers arrived, in that order.
	Answers []time.Time
	// Announcements are those of the card, in the order in which they reached the client.
	Announcements []Announcement
}

// FirstAnnouncement returns the first announcement after that time. ok is false if there is none.
func (p Pings) FirstAnnouncement(after time.Time) (a Announcement, ok bool) {
	for _, a := range p.Announcements {
		if a.At.After(after) {
			return a, true
		}
	}
	return Announcement{}, false
}

// FirstAnswer returns the time of the first answer after that time. ok is false if there is none.
func (p Pings) FirstAnswer(after time.Time) (at time.Time, ok bool) {
	for _, at := range p.Answers {
		if at.After(after) {
			return at, true
		}
	}
	return time.Time{}, false
}

// Pinger pings one network card of a VM from the client, on whichever host the VM is, and receives the card's
// announcements.
type Pinger struct {
	to       unix.SockaddrInet4
	id       uint16 // of the pinger's packets
	socket   *socket
	listener *listener
	stop     chan struct{}
	patience time.Duration // how long to wait for the last answers; set before stop is closed
	threads  sync.WaitGroup

	mu       sync.Mutex // guards the fields below
	sent     []time.Time
	answered []time.Time // by sequence number; zero if there is no answer yet
	arrivals int
	news     chan struct{} // closed and replaced when an answer comes
}

// Ping pings a card of the VM at that interval until Stop. The VM must have been started before.
func (l *Lab) Ping(c VMConfig, nic int, interval time.Duration) (_ *Pinger, err error) {
	if l.C == nil || nic >= c.NICs {
		return nil, fmt.Errorf("ping network card %d of VM %d: it was never there", nic, c.Number)
	}
	p := &Pinger{
		to: unix.SockaddrInet4{Addr: card.Addr(c.Number, nic).As4()}, id: uint16(c.Number<<8 | nic),
		stop: make(chan struct{}), news: make(chan struct{}),
	}
	if p.listener, err = l.listen(card.MAC(c.Number, nic), nic); err != nil {
		return nil, err
	}
	if p.socket, err = l.C.openSocket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP, nil); err != nil {
		return nil, errors.Join(err, p.listener.close())
	}
	received := make(chan struct{})
	go func() {
		defer close(received)
		p.receive()
	}()
	p.threads.Go(func() {
		p.send(interval)
		// Wait for the answers to all pings, but not for long.
		_ = p.socket.file.SetReadDeadline(time.Now().Add(p.patience))
		p.awaitAll(received)
		_ = p.socket.end()
		<-received
	})
	return p, nil
}

// ICMP's echo request and reply (RFC 792). Their data is an 8-byte sequence number, because ICMP's own wraps around.
const (
	icmpEcho      = 8
	icmpEchoReply = 0
	icmpHeader    = 8
	icmpPacket    = icmpHeader + 8 + 40
)

// send sends pings until it is stopped.
func (p *Pinger) send(interval time.Duration) {
	tick := time.NewTicker(interval) // skips ticks if it is late
	defer tick.Stop()
	for seq := 0; ; seq++ {
		packet := make([]byte, icmpPacket)
		packet[0] = icmpEcho
		binary.BigEndian.PutUint16(packet[4:], p.id)
		binary.BigEndian.PutUint16(packet[6:], uint16(seq))
		binary.BigEndian.PutUint64(packet[icmpHeader:], uint64(seq))
		binary.BigEndian.PutUint16(packet[2:], checksum(packet))
		p.mu.Lock()
		p.sent = append(p.sent, time.Now())
		p.answered = append(p.answered, time.Time{})
		p.mu.Unlock()
		_ = p.socket.send(packet, &p.to) // a ping that cannot be sent counts as lost
		select {
		case <-tick.C:
		case <-p.stop:
			return
		}
	}
}

// checksum is the Internet checksum (RFC 1071).
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum>>16 > 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// receive records answers until the socket's deadline.
func (p *Pinger) receive() {
	b := make([]byte, 2048)
	for {
		n, at, err := p.socket.receive(b)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return
		}
		if err == nil {
			p.note(b[:n], at)
		}
	}
}

// note records an answer. packet is an IP packet; note ignores it if it is no answer to this pinger.
func (p *Pinger) note(packet []byte, at time.Time) {
	if len(packet) < 20 || [4]byte(packet[12:16]) != p.to.Addr {
		return
	}
	header := int(packet[0]&0xf) * 4
	if len(packet) < header+icmpHeader+8 {
		return
	}
	packet = packet[header:]
	if packet[0] != icmpEchoReply || binary.BigEndian.Uint16(packet[4:]) != p.id {
		return
	}
	seq := binary.BigEndian.Uint64(packet[icmpHeader:])
	p.mu.Lock()
	defer p.mu.Unlock()
	if seq >= uint64(len(p.answered)) || !p.answered[seq].IsZero() {
		return
	}
	p.answered[seq] = at
	p.arrivals++
	close(p.news)
	p.news = make(chan struct{})
}

// awaitAll waits for all answers, or for the end of receive.
func (p *Pinger) awaitAll(received <-chan struct{}) {
	for {
		p.mu.Lock()
		complete, news := p.arrivals == len(p.sent), p.news
		p.mu.Unlock()
		if complete {
			return
		}
		select {
		case <-news:
		case <-received:
			return
		}
	}
}

// Await waits for the answer to a ping that was sent after that time.
func (p *Pinger) Await(ctx context.Context, after time.Time) error {
	for {
		p.mu.Lock()
		news, n := p.news, len(p.sent)
		for i := n - 1; i >= 0 && p.sent[i].After(after); i-- {
			if !p.answered[i].IsZero() {
				p.mu.Unlock()
				return nil
			}
		}
		p.mu.Unlock()
		select {
		case <-news:
		case <-ctx.Done():
			return fmt.Errorf("none of the pings since %v was answered, of %d in all: %w",
				after.Format(time.TimeOnly), n, context.Cause(ctx))
		}
	}
}

// AwaitAnswers waits until this many pings are answered.
func (p *Pinger) AwaitAnswers(ctx context.Context, answers int) error {
	for {
		p.mu.Lock()
		got, sent, news := p.arrivals, len(p.sent), p.news
		p.mu.Unlock()
		if got >= answers {
			return nil
		}
		select {
		case <-news:
		case <-ctx.Done():
			return fmt.Errorf("%d of %d pings were answered, %d are waited for: %w", got, sent, answers, context.Cause(ctx))
		}
	}
}

// FirstAnnouncement returns the first announcement so far after that time. ok is false if there is none.
func (p *Pinger) FirstAnnouncement(after time.Time) (a Announcement, ok bool) {
	return Pings{Announcements: p.listener.announcements()}.FirstAnnouncement(after)
}

// Stop ends the pinging and returns the result. It waits a few seconds for answers that are still missing. Call
// it once, before the lab is closed.
func (p *Pinger) Stop() (Pings, error) { return p.StopWithin(lastAnswers) }

// StopWithin is Stop with another limit for the last answers.
func (p *Pinger) StopWithin(patience time.Duration) (Pings, error) {
	p.patience = patience
	close(p.stop)
	p.threads.Wait()
	err := errors.Join(p.socket.file.Close(), p.listener.close())
	result := tally(p.sent, p.answered)
	result.Announcements = p.listener.announcements()
	return result, err
}
