// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/internal/qmp"
)

// copies knows when a VM ran on which host, by the events of its QEMUs. Both hosts of a lab have one clock, and QEMU
// tells to the microsecond when its VM ran and when it stopped. So two copies cannot run at once unnoticed, however
// short that is.
type copies struct {
	mu      sync.Mutex
	spans   []span
	clients map[*lab.Host]*qmp.Client
	done    sync.WaitGroup
}

// A span is a time during which the VM ran on a host.
type span struct {
	host        *lab.Host
	from, until time.Time // until is zero while it runs
}

// redial is how long a QEMU may exist before it is watched. A QEMU starts and loads for much longer before it runs a
// VM.
const redial = 3 * time.Millisecond

// watchCopies watches the QEMUs at a socket of each host until ctx ends. Then end returns when all watches have ended.
func watchCopies(ctx context.Context, socket string, hosts ...*lab.Host) *copies {
	c := &copies{clients: map[*lab.Host]*qmp.Client{}}
	for _, h := range hosts {
		c.done.Go(func() {
			for ctx.Err() == nil {
				c.watch(ctx, h, socket)
				select {
				case <-time.After(redial):
				case <-ctx.Done():
				}
			}
		})
	}
	return c
}

func (c *copies) end() { c.done.Wait() }

// watch follows one QEMU to its end.
func (c *copies) watch(ctx context.Context, h *lab.Host, socket string) {
	client, err := qmp.Dial(ctx, h.Path(socket))
	if err != nil {
		return // there is none, or none yet
	}
	defer client.Disconnect() //nolint:errcheck // QEMU has mostly ended it
	events := client.Subscribe("STOP", "RESUME")
	c.met(h, client)
	defer c.gone(h)
	if runs, err := lab.Runs(ctx, client); err == nil && runs {
		c.ran(h, time.Now())
	}
	for {
		select {
		case e, open := <-events.Events():
			switch {
			case !open:
				return
			case e.Name == "RESUME":
				c.ran(h, e.Time)
			default:
				c.stopped(h, e.Time)
			}
		case <-ctx.Done():
			return
		}
	}
}

func (c *copies) met(h *lab.Host, client *qmp.Client) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.clients[h] = client
}

func (c *copies) gone(h *lab.Host) {
	c.mu.Lock()
	delete(c.clients, h)
	c.mu.Unlock()
	c.stopped(h, time.Now())
}

func (c *copies) ran(h *lab.Host, at time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s := c.open(h); s == nil {
		c.spans = append(c.spans, span{host: h, from: at})
	} else if at.Before(s.from) {
		s.from = at // the event came while the QEMU was asked
	}
}

func (c *copies) stopped(h *lab.Host, at time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s := c.open(h); s != nil {
		s.until = at
	}
}

// open returns the span that has not ended; the caller holds mu.
func (c *copies) open(h *lab.Host) *span {
	for i := range c.spans {
		if s := &c.spans[i]; s.host == h && s.until.IsZero() {
			return s
		}
	}
	return nil
}

// runs reports whether the VM runs on h, by what its QEMU has said.
func (c *copies) runs(h *lab.Host) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.open(h) != nil
}

// ranOn reports whether the VM has run on h since a moment.
func (c *copies) ranOn(h *lab.Host, moment time.Time) bool {
	return slices.ContainsFunc(c.since(moment, time.Now()), func(s span) bool { return s.host == h })
}

// client returns the connection to the QEMU on h; nil without one.
func (c *copies) client(h *lab.Host) *qmp.Client {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.clients[h]
}

// since returns the spans that ended after a moment, in the order of their beginnings. A span that has not ended counts
// as ending now.
func (c *copies) since(moment, now time.Time) []span {
	c.mu.Lock()
	defer c.mu.Unlock()
	var found []span
	for _, s := range c.spans {
		if s.until.IsZero() {
			s.until = now
		}
		if s.until.After(moment) {
			found = append(found, s)
		}
	}
	slices.SortFunc(found, func(a, b span) int { return cmp.Compare(a.from.UnixNano(), b.from.UnixNano()) })
	return found
}

// A twiceError says that two copies of a VM ran at once.
type twiceError struct{ a, b span }

func (e *twiceError) Error() string {
	return fmt.Sprintf("two copies ran at once: on host %s from %v to %v, on host %s from %v to %v",
		e.a.host.Name, e.a.from.Format(time.StampMicro), e.a.until.Format(time.StampMicro),
		e.b.host.Name, e.b.from.Format(time.StampMicro), e.b.until.Format(time.StampMicro))
}

// overlap returns an error if two of the spans, which are in the order of their beginnings, overlap in time.
func overlap(spans []span) error {
	for i, a := range spans {
		for _, b := range spans[i+1:] {
			if a.host != b.host && b.from.Before(a.until) {
				return &twiceError{a, b}
			}
		}
	}
	return nil
}

// longestGap returns the longest time between two spans in which the VM ran nowhere.
func longestGap(spans []span) time.Duration {
	var longest time.Duration
	var until time.Time
	for _, s := range spans {
		if !until.IsZero() {
			longest = max(longest, s.from.Sub(until))
		}
		if s.until.After(until) {
			until = s.until
		}
	}
	return longest
}
