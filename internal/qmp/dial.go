// SPDX-License-Identifier: Apache-2.0

package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// greetingTimeout bounds the wait for a greeting where the caller's context is more patient: QEMU sends
// it as soon as its main loop turns.
const greetingTimeout = 5 * time.Second

// maxSocketPath is the longest path of a socket, which ends with a zero (sun_path, unix(7)).
const maxSocketPath = len(unix.RawSockaddrUnix{}.Path) - 1

// Dial connects to the QMP Unix socket at path and negotiates. The greeting decides whether it is one: a
// *NotQMPError says that it is not, a *BusyError that another client holds it. Errors of connect(2), such as
// fs.ErrNotExist, can be found with errors.Is.
func Dial(ctx context.Context, path string) (*Client, error) {
	var dialer net.Dialer
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("connect to the QMP socket: its path %s has %d bytes, and a socket's may have %d: "+
			"give it by a shorter one, a symbolic link to its directory say", path, len(path), maxSocketPath)
	}
	plain, err := dialer.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("connect to the QMP socket: %w%s", err, connectRemedy(err))
	}
	conn, ok := plain.(*net.UnixConn)
	if !ok {
		plain.Close()
		return nil, fmt.Errorf("connect to the QMP socket %s: got a %T", path, plain)
	}
	c, err := New(ctx, conn, path, "")
	if err != nil {
		conn.Close()
		return nil, err
	}
	return c, nil
}

func connectRemedy(err error) string {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "; give the path of the -qmp socket of a running QEMU"
	case errors.Is(err, unix.ECONNREFUSED):
		return "; nobody listens there: the QEMU that made it has ended, or it is no socket"
	case errors.Is(err, fs.ErrPermission):
		return "; connecting needs write permission on the socket and search permission on its directories"
	case errors.Is(err, unix.EAGAIN):
		return "; its backlog is full: QEMU hangs, or other clients wait for it"
	}
	return ""
}

// New negotiates on a connection that somebody has made, and calls it path. via is the program that passes on what is
// said, if QEMU does not listen itself. New owns conn unless it fails.
func New(ctx context.Context, conn *net.UnixConn, path, via string) (*Client, error) {
	peer, err := peerOf(conn)
	if err != nil {
		return nil, fmt.Errorf("who listens at %s: %w", path, err)
	}
	c := &Client{
		path:          path,
		via:           via,
		conn:          conn,
		peer:          peer,
		writing:       make(chan struct{}, 1),
		passing:       make(chan struct{}, 1),
		pending:       make(map[uint64]*call),
		subscriptions: make(map[*Subscription]struct{}),
		done:          make(chan struct{}),
	}
	c.lastID.Store(uint64(rand.Uint32()) << 16) // a late reply to the client before is not taken for one of ours
	limit := &io.LimitedReader{R: conn, N: maxMessage}
	buffered := bufio.NewReaderSize(limit, 64<<10)
	in := json.NewDecoder(buffered)

	ctx, cancel := context.WithTimeoutCause(ctx, greetingTimeout, fmt.Errorf("no greeting within %v", greetingTimeout))
	defer cancel()
	if c.version, err = c.greeting(ctx, buffered, in); err != nil {
		return nil, err
	}
	go c.read(in, limit)
	if err := c.Do(ctx, "qmp_capabilities", nil, nil); err != nil {
		conn.Close()
		<-c.done
		return nil, fmt.Errorf("negotiate with QEMU at %s: %w", path, err)
	}
	return c, nil
}

// hello is a message before the greeting, or the greeting.
type hello struct {
	QMP *struct {
		Version struct {
			QEMU Version `json:"qemu"`
		} `json:"version"`
	} `json:"QMP"`
	Event  json.RawMessage `json:"event"`
	Return json.RawMessage `json:"return"`
	Error  json.RawMessage `json:"error"`
}

// isForAnother says that QEMU meant the message for the client before. Its main thread still writes what it has for that
// client when the monitor's own thread has taken the next connection, until that thread begins anew with the greeting
// (QEMU's monitor/qmp.c, monitor_qmp_event and qmp_send_response).
func (h hello) isForAnother() bool { return h.Event != nil || h.Return != nil || h.Error != nil }

// greeting reads up to the greeting: {"QMP": {"version": ..., "capabilities": [...]}}. The limit of one message holds for
// all that is before it.
func (c *Client) greeting(ctx context.Context, buffered *bufio.Reader, in *json.Decoder) (Version, error) {
	expired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = c.conn.SetReadDeadline(time.Unix(1, 0)) // the connection is open
		close(expired)
	})
	first, err := buffered.Peek(1)
	if err == nil && first[0] != '{' {
		start, _ := buffered.Peek(min(buffered.Buffered(), 60)) // what is buffered is there
		return Version{}, &NotQMPError{Path: c.path, Got: strings.TrimSpace(string(start))}
	}
	var h hello
	for err == nil {
		h = hello{}
		if err = in.Decode(&h); !h.isForAnother() {
			break
		}
	}
	if !stop() {
		<-expired
	}
	switch {
	case err != nil:
		return Version{}, c.noGreeting(ctx, err)
	case ctx.Err() != nil:
		return Version{}, c.noGreeting(ctx, context.Cause(ctx))
	case h.QMP == nil:
		return Version{}, &NotQMPError{Path: c.path, Got: "{...}, a JSON object without the member QMP"}
	}
	return h.QMP.Version.QEMU, nil
}

func (c *Client) noGreeting(ctx context.Context, err error) error {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = context.Cause(ctx)
	}
	switch {
	case errors.Is(err, unix.ECONNRESET), errors.Is(err, io.ErrUnexpectedEOF):
		return &DisconnectedError{Path: c.path, Via: c.via, Cause: err}
	case ctx.Err() != nil && !c.accepted():
		return &BusyError{Path: c.path, Cause: err}
	}
	return &NotQMPError{Path: c.path, Cause: err}
}
