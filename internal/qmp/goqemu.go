// SPDX-License-Identifier: Apache-2.0

package qmp

import (
	"context"
	"encoding/json"

	goqemu "github.com/digitalocean/go-qemu/qmp"
)

// A Client is what programs for go-qemu want.
var _ goqemu.Monitor = (*Client)(nil)

// Events is part of go-qemu's Monitor: all events until ctx or the connection ends, then the channel is
// closed. A receiver that falls too far behind loses events; Subscribe tells how many.
func (c *Client) Events(ctx context.Context) (<-chan goqemu.Event, error) {
	if err := c.Err(); err != nil {
		return nil, err
	}
	events := make(chan goqemu.Event)
	s := c.Subscribe()
	go func() {
		defer close(events)
		defer s.Close()
		for {
			select {
			case <-ctx.Done():
				return
			case e, open := <-s.Events():
				if !open || !forward(ctx, events, e) {
					return
				}
			}
		}
	}()
	return events, nil
}

func forward(ctx context.Context, to chan<- goqemu.Event, e Event) bool {
	converted := goqemu.Event{Event: e.Name}
	if e.Data != nil {
		// The reader has parsed it: it is JSON, and an object in every event that QEMU has.
		_ = json.Unmarshal(e.Data, &converted.Data)
	}
	converted.Timestamp.Seconds = e.Time.Unix()
	converted.Timestamp.Microseconds = int64(e.Time.Nanosecond() / 1000)
	select {
	case to <- converted:
		return true
	case <-ctx.Done():
		return false
	}
}
