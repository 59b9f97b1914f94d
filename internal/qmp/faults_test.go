// SPDX-License-Identifier: Apache-2.0

package qmp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// These tests play QEMU themselves, to do what a real one does only by chance.

// listen makes a socket and returns the channel on which its connections arrive.
func listen(t *testing.T) (path string, conns <-chan net.Conn) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "socket")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	accepted := make(chan net.Conn, 1)
	go func() {
		conn, err := l.Accept()
		if err == nil {
			t.Cleanup(func() { conn.Close() })
			accepted <- conn
		}
	}()
	t.Cleanup(func() { l.Close() })
	return path, accepted
}

// fakeQEMU sends the messages that a test tells it to.
type fakeQEMU struct {
	t    *testing.T
	conn net.Conn
	in   *json.Decoder
}

// dialFake connects to a fakeQEMU that sends the lines before in front of its greeting.
func dialFake(t *testing.T, before ...string) (*Client, *fakeQEMU) {
	t.Helper()
	path, conns := listen(t)
	ready := make(chan *fakeQEMU)
	go func() {
		conn := <-conns
		p := &fakeQEMU{t, conn, json.NewDecoder(conn)}
		for _, line := range before {
			p.say("%s", line)
		}
		p.say(`{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}}, "capabilities": []}}`)
		p.say(`{"return": {}, "id": %d}`, p.command("qmp_capabilities"))
		ready <- p
	}()
	c, err := Dial(testContext(t), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Disconnect(); err != nil {
			t.Error(err)
		}
	})
	return c, <-ready
}

// command receives the next command, which must be want, and returns its id.
func (p *fakeQEMU) command(want string) uint64 {
	var got struct {
		Execute string
		ID      uint64
	}
	if err := p.in.Decode(&got); err != nil || got.Execute != want {
		p.t.Errorf("command %+v, %v, want %s", got, err, want)
	}
	return got.ID
}

// say sends one line to the client.
func (p *fakeQEMU) say(format string, args ...any) {
	if _, err := fmt.Fprintf(p.conn, format+"\r\n", args...); err != nil {
		p.t.Error(err)
	}
}

// A new client may receive messages to the previous client before the greeting.
func TestGreetingAfterOthersMessages(t *testing.T) {
	c, qemu := dialFake(t,
		`{"timestamp": {"seconds": 1, "microseconds": 0}, "event": "JOB_STATUS_CHANGE", "data": {"status": "null"}}`,
		`{"return": {}, "id": 1}`,
		`{"error": {"class": "GenericError", "desc": "late"}}`)
	if got := c.Version(); got != (Version{7, 2, 22}) {
		t.Errorf("version %v", got)
	}
	result := make(chan error)
	var answer string
	go func() { result <- c.Do(testContext(t), "first", nil, &answer) }()
	id := qemu.command("first")
	qemu.say(`{"return": "of the client before", "id": 2}`)
	qemu.say(`{"return": "right", "id": %d}`, id)
	if err := <-result; err != nil || answer != "right" {
		t.Errorf("%q, %v", answer, err)
	}
}

func TestLateReplyIsDropped(t *testing.T) {
	c, qemu := dialFake(t)
	ctx, cancel := context.WithCancelCause(testContext(t))
	gaveUp := errors.New("gave up")
	result := make(chan error)
	go func() { result <- c.Do(ctx, "first", nil, nil) }()
	first := qemu.command("first")
	cancel(gaveUp)
	if err := <-result; !errors.Is(err, gaveUp) {
		t.Errorf("abandoned command: %v", err)
	}

	var answer string
	go func() { result <- c.Do(testContext(t), "second", nil, &answer) }()
	second := qemu.command("second")
	qemu.say(`{"return": "late", "id": %d}`, first)
	qemu.say(`{"return": "never asked", "id": 4711}`)
	qemu.say(`{"error": {"class": "GenericError", "desc": "of nothing that has an id"}}`)
	qemu.say(`{"return": "right", "id": %d}`, second)
	if err := <-result; err != nil || answer != "right" {
		t.Errorf("second command: %q, %v", answer, err)
	}
	if len(c.pending) != 0 {
		t.Errorf("%d calls are still remembered", len(c.pending))
	}
}

func TestAbandonedDescriptorHoldsBackTheNext(t *testing.T) {
	c, qemu := dialFake(t)
	file := openDirectory(t)
	ctx, cancel := context.WithCancel(testContext(t))
	result := make(chan error)
	go func() { result <- c.DoWithFD(ctx, "getfd", nil, nil, file) }()
	first := qemu.command("getfd")
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("abandoned descriptor: %v", err)
	}
	// QEMU has not answered the first getfd yet: a second must not be sent, other commands may.
	impatient, cancel := context.WithTimeout(testContext(t), 50*time.Millisecond)
	defer cancel()
	if err := c.DoWithFD(impatient, "getfd", nil, nil, file); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("second descriptor: %v", err)
	}
	go func() { result <- c.Do(testContext(t), "other", nil, nil) }()
	qemu.say(`{"return": {}, "id": %d}`, qemu.command("other")) // and not a getfd
	if err := <-result; err != nil {
		t.Error(err)
	}
	qemu.say(`{"return": {}, "id": %d}`, first)
	go func() { result <- c.DoWithFD(testContext(t), "getfd", nil, nil, file) }()
	qemu.say(`{"return": {}, "id": %d}`, qemu.command("getfd"))
	if err := <-result; err != nil {
		t.Errorf("third descriptor: %v", err)
	}
}

func TestSlowSubscriberLosesItsOwnEventsOnly(t *testing.T) {
	c, qemu := dialFake(t)
	slow, selective := c.Subscribe(), c.Subscribe("LAST")
	const lost = 7
	made := time.Unix(time.Now().Add(-2*time.Second).Unix(), 5000)
	result := make(chan error)
	go func() { result <- c.Do(testContext(t), "command", nil, nil) }()
	id := qemu.command("command")
	for range eventBuffer + lost - 1 {
		qemu.say(`{"event": "NOISE", "timestamp": {"seconds": 1, "microseconds": 5}}`)
	}
	qemu.say(`{"event": "LAST", "data": {"a": 1}, "timestamp": {"seconds": %d, "microseconds": 5}}`, made.Unix())
	qemu.say(`{"return": {}, "id": %d}`, id)
	if err := <-result; err != nil {
		t.Fatal(err)
	}
	if got := slow.Dropped(); got != lost {
		t.Errorf("the slow one lost %d, want %d", got, lost)
	}
	if e := <-selective.Events(); e.Name != "LAST" || string(e.Data) != `{"a": 1}` || !e.Time.Round(0).Equal(made) ||
		selective.Dropped() != 0 {
		t.Errorf("the selective one got %+v and lost %d", e, selective.Dropped())
	}
}

func TestGarbageEndsTheConnection(t *testing.T) {
	c, qemu := dialFake(t)
	result := make(chan error)
	go func() { result <- c.Do(testContext(t), "command", nil, nil) }()
	qemu.command("command")
	qemu.say("(qemu) ")
	var broken *DisconnectedError
	if err := <-result; !errors.As(err, &broken) {
		t.Errorf("command: %v", err)
	}
	<-c.Done()
}

// A command to a QEMU that does not read ends with its context.
func TestBlockedWrite(t *testing.T) {
	c, qemu := dialFake(t)
	ctx, cancel := context.WithCancel(testContext(t))
	go func() {
		// The first byte has arrived; the whole command does not fit into the socket's buffer.
		if _, err := qemu.conn.Read(make([]byte, 1)); err != nil {
			t.Error(err)
		}
		cancel()
	}()
	if err := c.Do(ctx, "command", make([]byte, 8<<20), nil); !errors.Is(err, context.Canceled) {
		t.Errorf("blocked command: %v", err)
	}
	<-c.Done() // half a command was sent
}

func openDirectory(t *testing.T) *os.File {
	t.Helper()
	f, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// TestCommandMeetsTheEnd: a command that is being written when the reader learns that QEMU has exited fails with that,
// and not with the close of the connection that followed.
func TestCommandMeetsTheEnd(t *testing.T) {
	path, conns := listen(t)
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	<-conns // and nobody reads from it
	c := &Client{
		path: path, conn: conn.(*net.UnixConn), writeSlot: make(chan struct{}, 1), pending: map[uint64]*call{},
		done: make(chan struct{}),
	}
	result := make(chan error, 1)
	go func() { result <- c.Do(testContext(t), "x", strings.Repeat("more than a socket takes", 1<<18), nil) }()
	awaitPending(t, c, 1)
	c.end(io.EOF) // as the reader does it
	awaitPending(t, c, 0)
	close(c.done)
	if err := <-result; !errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
		t.Errorf("a command that meets the end of QEMU: %v", err)
	}
}

// awaitPending waits until n commands have no reply.
func awaitPending(t *testing.T, c *Client, n int) {
	t.Helper()
	for ctx := testContext(t); ; time.Sleep(time.Millisecond) {
		c.mu.Lock()
		now := len(c.pending)
		c.mu.Unlock()
		if now == n {
			return
		}
		if ctx.Err() != nil {
			t.Fatalf("%d commands have no reply, not %d", now, n)
		}
	}
}
