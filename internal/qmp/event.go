// SPDX-License-Identifier: Apache-2.0

package qmp

import (
	"encoding/json"
	"sync/atomic"
	"time"
)

// eventBuffer is how many events a subscription keeps for a slow receiver. QEMU limits the rate of its most
// frequent events (monitor_qapi_event_conf in monitor/monitor.c).
const eventBuffer = 256

// Event is a message that QEMU sends without being asked.
type Event struct {
	Name string          // "STOP", "RESUME", "MIGRATION", ...
	Data json.RawMessage // a JSON object; nil if the event has none
	Time time.Time       // when it happened, to the microsecond, by the clocks of this process; see eventTime
}

// Subscription receives the events that QEMU sends after it was made. Close it when it is no longer needed.
type Subscription struct {
	client  *Client
	names   map[string]bool // empty: all
	events  chan Event      // closed under client.mu
	dropped atomic.Uint64
}

// Subscribe makes a subscription to the named events, or to all events if no name is given. An event that QEMU
// sends before a reply is in the subscription before Do returns that reply.
func (c *Client) Subscribe(names ...string) *Subscription {
	s := &Subscription{
		client: c,
		names:  make(map[string]bool, len(names)),
		events: make(chan Event, eventBuffer),
	}
	for _, name := range names {
		s.names[name] = true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		close(s.events)
		return s
	}
	c.subscriptions[s] = struct{}{}
	return s
}

// Events is closed when the connection ends (see Client.Err) and by Close.
func (s *Subscription) Events() <-chan Event { return s.events }

// Dropped is how many events were lost so far because the buffer was full.
func (s *Subscription) Dropped() uint64 { return s.dropped.Load() }

// Close ends the subscription. Events that were received before it can still be read.
func (s *Subscription) Close() {
	s.client.mu.Lock()
	defer s.client.mu.Unlock()
	if _, exists := s.client.subscriptions[s]; exists {
		delete(s.client.subscriptions, s)
		close(s.events)
	}
}

// offer adds an event of a subscribed name to the buffer, or counts it as dropped if the buffer is full.
func (s *Subscription) offer(e Event) {
	if len(s.names) != 0 && !s.names[e.Name] {
		return
	}
	select {
	case s.events <- e:
	default:
		s.dropped.Add(1)
	}
}
