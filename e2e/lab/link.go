// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Link describes the network between the two hosts. It is the same in both
// directions.
type Link struct {
	// Rate is in bits per second. It counts Ethernet frames with preamble and
	// gap. 0 means no limit but this machine's.
	Rate int64
	// Delay is the time of a packet from one host to the other, without the time
	// to send its bits and those of packets before it.
	Delay time.Duration
	// Loss is the probability, from 0 to 1, that a packet is lost. A packet is
	// what a host sends at once, for TCP up to 64 KiB.
	Loss float64
	// Seed decides which packets are lost. The same seed loses the same ones.
	Seed uint64
}

// Stats counts what one direction of a link carried since the lab was made.
type Stats struct {
	// At is the time of the statistics, by the link's own clock.
	At time.Duration
	// Packets and Bytes went onto the wire, including lost packets. Bytes
	// are those of Ethernet: they took 8*Bytes/Rate seconds.
	Packets, Bytes int64
	Lost           int64 // packets lost because of Link.Loss
	Dropped        int64 // packets dropped because the queue before the wire was full
	Cut            int64 // packets lost because the wire was cut
	Refused        int64 // packets that the receiving host did not take: its cable is pulled
}

// NewWithLink makes the two hosts, joined by an emulated link instead of the
// kernel's. It needs root and /dev/net/tun.
func NewWithLink(ctx context.Context, link Link) (*Lab, error) {
	return newLab(func(l *Lab) error { return l.emulate(ctx, link) })
}

// emulate joins the two network namespaces by two TUN devices and two threads
// that carry the packets between them.
func (l *Lab) emulate(ctx context.Context, link Link) error {
	a, err := l.A.openTUN()
	if err != nil {
		return err
	}
	l.onClose(func() error { return unix.Close(a) })
	b, err := l.B.openTUN()
	if err != nil {
		return err
	}
	l.onClose(func() error { return unix.Close(b) })
	stop, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("eventfd that ends the link: %w", err)
	}
	l.AB, l.BA = newWire(a, b, 1), newWire(b, a, 2)
	var threads sync.WaitGroup
	for _, w := range []*Wire{l.AB, l.BA} {
		w.Set(link)
		threads.Go(func() { w.carry(stop) })
	}
	l.onClose(func() error {
		_, err := unix.Write(stop, []byte{1, 0, 0, 0, 0, 0, 0, 0})
		threads.Wait()
		return errors.Join(err, unix.Close(stop))
	})
	for _, h := range l.Hosts() {
		// The cable carries only what a test sends: IPv6 must not look for routers.
		if _, err := h.Run(ctx, "ip", "link", "set", "cable", "mtu", "1500", "addrgenmode", "none"); err != nil {
			return err
		}
	}
	return l.plug(ctx)
}
