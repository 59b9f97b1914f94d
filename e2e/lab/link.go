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

// A Link is what the network between the two hosts is like, the same in both
// directions.
type Link struct {
	// Rate is in bits a second, of Ethernet frames with all that surrounds
	// them; 0 is whatever this machine can do.
	Rate int64
	// Delay is what a packet takes from one host to the other besides the time
	// of its bits and of those before it.
	Delay time.Duration
	// Loss is the probability, from 0 to 1, that a packet is lost. A packet is
	// what a host hands over at once, for TCP up to 64 KiB.
	Loss float64
	// Seed decides which packets are lost: the same ones for the same seed.
	Seed uint64
}

// Stats counts what one direction of a link carried since the lab was made.
type Stats struct {
	// At is when they were taken, by the clock that the link carries by.
	At time.Duration
	// Packets and Bytes went onto the wire, the lost ones among them. Bytes
	// are Ethernet's: they took 8*Bytes/Rate seconds.
	Packets, Bytes int64
	Lost           int64 // packets, as Link.Loss wants it
	Dropped        int64 // packets that found the queue before the wire full
	Cut            int64 // packets that met a wire that was cut
	Refused        int64 // packets that the receiving host did not take: its cable is pulled
}

// NewWithLink makes the two hosts, joined by an emulated link instead of the
// kernel's. It needs root and /dev/net/tun.
func NewWithLink(ctx context.Context, link Link) (*Lab, error) {
	return newLab(func(l *Lab) error { return l.emulate(ctx, link) })
}

// emulate joins the two network namespaces by two TUN devices and two threads
// that carry what one host sends to the other.
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
	for _, h := range []*Host{l.A, l.B} {
		// Nothing but what a test sends: no router is looked for by IPv6.
		if _, err := h.Run(ctx, "ip", "link", "set", "cable", "mtu", "1500", "addrgenmode", "none"); err != nil {
			return err
		}
	}
	return l.plug(ctx)
}
