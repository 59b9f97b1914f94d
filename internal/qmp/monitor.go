// SPDX-License-Identifier: Apache-2.0

package qmp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
)

// Connect is part of go-qemu's Monitor. Dial has connected already: it fails only when that connection is
// over, because a Client has one connection in its life.
func (c *Client) Connect() error { return c.Err() }

// Disconnect ends the connection and returns when the reader has ended. It may be called repeatedly.
func (c *Client) Disconnect() error {
	err := c.conn.Close()
	<-c.done
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// Run sends a command in JSON and returns the whole reply, as go-qemu's monitors do: the result is its
// member "return". An "id" in the command is replaced by ours. It waits as long as QEMU takes; new code uses
// Do.
func (c *Client) Run(command []byte) ([]byte, error) {
	var members map[string]json.RawMessage
	if err := json.Unmarshal(command, &members); err != nil {
		return nil, fmt.Errorf("command %.80q: %w", command, err)
	}
	var name string
	if err := json.Unmarshal(members["execute"], &name); err != nil {
		return nil, fmt.Errorf("command %.80q: its member \"execute\": %w", command, err)
	}
	id := c.lastID.Add(1)
	members["id"] = json.RawMessage(fmt.Sprint(id))
	line, err := json.Marshal(members)
	if err != nil {
		return nil, fmt.Errorf("%s: encode the command: %w", name, err)
	}
	waiting, err := c.enter(context.Background(), id, line, nil)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	r, err := c.await(context.Background(), waiting)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if r.Error != nil {
		r.Error.Command = name
		return nil, r.Error
	}
	return r.raw, nil
}
