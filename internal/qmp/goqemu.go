// SPDX-License-Identifier: Apache-2.0

package qmp

import (
	"context"
	"encoding/json"
	"fmt"

	goqemu "github.com/digitalocean/go-qemu/qmp"
	"github.com/digitalocean/go-qemu/qmp/raw"
)

// Typed returns go-qemu's generated commands, such as QueryName, over this connection. They wait no longer than ctx,
// and fail with the errors of Do.
//
// go-qemu was generated from the schema of QEMU 2.11: it lacks newer commands, drops newer members, and fails on a
// value that an enumeration has got since. Use Typed for replies without enumerations and unions, and Do for the rest.
func (c *Client) Typed(ctx context.Context) *raw.Monitor { return raw.NewMonitor(c.Monitor(ctx)) }

// Monitor returns the connection as go-qemu's Monitor, for code that is written for go-qemu. ctx bounds each command.
// The connection stays the Client's: the Monitor's Disconnect ends it for both.
func (c *Client) Monitor(ctx context.Context) goqemu.Monitor { return &monitor{ctx: ctx, client: c} }

// monitor implements go-qemu's Monitor. It keeps a context because the method Run has none.
type monitor struct {
	ctx    context.Context
	client *Client
}

// Connect fails only if the connection has ended: a Client is connected when it is made, and never again.
func (m *monitor) Connect() error { return m.client.Err() }

// Disconnect ends the Client's connection.
func (m *monitor) Disconnect() error { return m.client.Disconnect() }

// Run sends a command in JSON and returns the whole reply, whose member "return" is the result. An "id" in the command
// is replaced by the Client's.
func (m *monitor) Run(command []byte) ([]byte, error) {
	var members map[string]json.RawMessage
	if err := json.Unmarshal(command, &members); err != nil {
		return nil, fmt.Errorf("command %.80q: %w", command, err)
	}
	var name string
	if err := json.Unmarshal(members["execute"], &name); err != nil {
		return nil, fmt.Errorf("command %.80q: its member \"execute\": %w", command, err)
	}
	id := m.client.lastID.Add(1)
	members["id"] = json.RawMessage(fmt.Sprint(id))
	line, err := json.Marshal(members)
	if err != nil {
		return nil, fmt.Errorf("%s: encode the command: %w", name, err)
	}
	waiting, err := m.client.submit(m.ctx, id, line, nil)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	r, err := m.client.await(m.ctx, waiting)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if r.Error != nil {
		r.Error.Command = name
		return nil, r.Error
	}
	return r.raw, nil
}

// Events returns all events until ctx or the connection ends, and then closes the channel. A receiver that falls more
// than eventBuffer events behind loses events; Client.Subscribe counts them.
func (m *monitor) Events(ctx context.Context) (<-chan goqemu.Event, error) {
	if err := m.client.Err(); err != nil {
		return nil, err
	}
	events := make(chan goqemu.Event)
	s := m.client.Subscribe()
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

// forward sends an event unless ctx ends first.
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
