// SPDX-License-Identifier: Apache-2.0

package qmp

import (
	"encoding/json"
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

// Client is one connection to a QEMU. Its methods may be called from several goroutines at once. It owns
// the connection until Disconnect.
type Client struct {
	path    string
	via     string // what passes on all that is said; empty: QEMU listens itself
	conn    *net.UnixConn
	peer    credentials
	version Version

	lastID atomic.Uint64
	// A slot is taken by sending to it, so that the wait for it can be given up.
	writing chan struct{} // one command is written at a time
	passing chan struct{} // one descriptor is on its way at a time, see DoWithFD

	mu            sync.Mutex // guards what follows; never held while waiting
	pending       map[uint64]*call
	subscriptions map[*Subscription]struct{}
	err           error // why the connection ended

	done chan struct{} // closed when the reader has ended
}

// A call is a command that was not answered yet. It outlives whoever waits for it, so that a reply that
// nobody wants any more is recognized.
type call struct {
	reply  chan reply // has room for the reply
	passes bool       // holds the slot 'passing'
}

type reply struct {
	raw json.RawMessage // the whole reply
	message
}

// message is any of the three things that QEMU sends.
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

// PeerPID is the process that listens at the socket, from SO_PEERCRED. That is QEMU, unless whoever
// started QEMU made the socket and handed it over (as libvirt does).
func (c *Client) PeerPID() int { return c.peer.pid }

// PeerUID is the effective user id that PeerPID had when it began to listen.
func (c *Client) PeerUID() uint32 { return c.peer.uid }

// Version is the version of the connected QEMU.
func (c *Client) Version() Version { return c.version }

// Path is the socket's, as given to Dial.
func (c *Client) Path() string { return c.path }

// Done is closed when the connection has ended, whoever ended it.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err is nil while the connection lasts, and then a *DisconnectedError.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// read takes in what QEMU sends until the connection ends.
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
				Time: arrivedFrom(time.Unix(m.Timestamp.Seconds, m.Timestamp.Microseconds*int64(time.Microsecond)), time.Now()),
			})
		case m.ID != nil:
			c.answer(*m.ID, reply{raw: raw, message: m})
		}
		// What is neither carries no id of ours: nobody waits for it.
	}
}

func (c *Client) answer(id uint64, r reply) {
	c.mu.Lock()
	defer c.mu.Unlock()
	waiting, exists := c.pending[id]
	if !exists {
		return
	}
	delete(c.pending, id)
	if waiting.passes {
		<-c.passing
	}
	waiting.reply <- r
}

func (c *Client) publish(e Event) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for s := range c.subscriptions {
		s.offer(e)
	}
}

// end is called once, by the reader; waiting calls learn of it by done.
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

// longestWay is how long an event may plausibly have been on its way.
const longestWay = time.Minute

// arrivedFrom is the time of an event that QEMU's clock, the host's, calls stamped and that is read now. It has a reading of
// the monotonic clock, as far as the wall clock was not put elsewhere between the two: then it is now.
func arrivedFrom(stamped, now time.Time) time.Time {
	age := now.Round(0).Sub(stamped)
	if age < 0 || age > longestWay {
		return now
	}
	return now.Add(-age)
}
