// SPDX-License-Identifier: Apache-2.0

package qmp

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// maxMessage bounds one reply or event, in bytes. The largest that QEMU sends, query-qmp-schema, is a few
// hundred KiB; the bound keeps a broken QEMU from exhausting the daemon's memory.
const maxMessage = 64 << 20

// Version is QEMU's own version, as its greeting gave it.
type Version struct{ Major, Minor, Micro int }

func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Micro) }

// Client is one connection to a QEMU. Its methods may be called by several goroutines at once. It owns
// the connection until Disconnect.
type Client struct {
	path    string
	via     string // the program that relays all messages, such as libvirt; empty: QEMU itself listens
	conn    *net.UnixConn
	peer    credentials
	version Version

	lastID atomic.Uint64
	// Each slot is held by one goroutine at a time: sending takes it, receiving frees it. Unlike a mutex, a slot can be
	// waited for with a context.
	writeSlot chan struct{} // held while a command is written
	fdSlot    chan struct{} // held from the sending of a descriptor to the reply, see DoWithFD

	mu            sync.Mutex // guards what follows; never held while waiting
	pending       map[uint64]*call
	subscriptions map[*Subscription]struct{}
	err           error // why the connection ended

	done chan struct{} // closed when the reader has ended
}

// A call is a command without a reply yet. It stays in Client.pending when its caller gives up waiting, so that the
// late reply is recognized and dropped.
type call struct {
	reply       chan reply // has room for the reply
	holdsFDSlot bool
}

// A reply is QEMU's reply to a command.
type reply struct {
	raw json.RawMessage // the whole reply
	message
}

// message is anything that QEMU sends: a result, an error or an event.
type message struct {
	ID        *uint64         `json:"id"`
	Return    json.RawMessage `json:"return"`
	Error     *Error          `json:"error"`
	Event     string          `json:"event"`
	Data      json.RawMessage `json:"data"`
	Timestamp struct {
		Seconds      int64 `json:"seconds"`
		Microseconds int64 `json:"microseconds"`
	} `json:"timestamp"`
}

// PeerPID is the process that listens on the socket, from SO_PEERCRED. That is QEMU, unless the program that
// started QEMU made the socket and passed it on (as libvirt does).
func (c *Client) PeerPID() int { return c.peer.pid }

// PeerUID is the effective user id that the process PeerPID had when it began to listen.
func (c *Client) PeerUID() uint32 { return c.peer.uid }

// Version is the version of the connected QEMU.
func (c *Client) Version() Version { return c.version }

// Path is the path of the socket, as given to Dial or New.
func (c *Client) Path() string { return c.path }

// Done is closed when the connection has ended, at either end.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err is nil while the connection is open, and a *DisconnectedError after that.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Disconnect ends the connection and returns when the reader has ended. It may be called repeatedly.
func (c *Client) Disconnect() error {
	err := c.conn.Close()
	<-c.done
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// read receives QEMU's messages until the connection ends.
func (c *Client) read(in *json.Decoder, limit *io.LimitedReader) {
	defer close(c.done)
	for {
		limit.N = maxMessage
		var raw json.RawMessage
		if err := in.Decode(&raw); err != nil {
			c.end(err)
			return
		}
		var m message
		if err := json.Unmarshal(raw, &m); err != nil {
			c.end(fmt.Errorf("message %.80q: %w", raw, err))
			return
		}
		switch {
		case m.Event != "":
			c.publish(Event{
				Name: m.Event,
				Data: m.Data,
				Time: eventTime(time.Unix(m.Timestamp.Seconds, m.Timestamp.Microseconds*int64(time.Microsecond)), time.Now()),
			})
		case m.ID != nil:
			c.answer(*m.ID, reply{raw: raw, message: m})
		}
		// A message that is neither an event nor has an id is nobody's reply: it is dropped.
	}
}

// answer gives a reply to the caller that waits for it, if one does.
func (c *Client) answer(id uint64, r reply) {
	c.mu.Lock()
	defer c.mu.Unlock()
	waiting, exists := c.pending[id]
	if !exists {
		return
	}
	delete(c.pending, id)
	if waiting.holdsFDSlot {
		<-c.fdSlot
	}
	waiting.reply <- r
}

// publish offers an event to all subscriptions.
func (c *Client) publish(e Event) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for s := range c.subscriptions {
		s.offer(e)
	}
}

// end closes the connection and all subscriptions, and records the cause. The reader calls it once; calls that wait
// learn of it from done.
func (c *Client) end(cause error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = &DisconnectedError{Path: c.path, Via: c.via, Cause: cause}
	c.conn.Close()
	for s := range c.subscriptions {
		close(s.events)
	}
	clear(c.subscriptions)
}

// maxEventAge is the longest plausible time from an event to its arrival here.
const maxEventAge = time.Minute

// eventTime converts the wall-clock timestamp of an event that arrived at the time now into a time with a monotonic
// reading, which can be compared with other times of this process. It returns now if the wall clock was set in between:
// the event is then from the future, or older than maxEventAge.
func eventTime(timestamp, now time.Time) time.Time {
	age := now.Round(0).Sub(timestamp)
	if age < 0 || age > maxEventAge {
		return now
	}
	return now.Add(-age)
}
