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

// greetingTimeout bounds the wait for the greeting if the caller's context ends later. QEMU sends the greeting in
// the next turn of its main loop.
const greetingTimeout = 5 * time.Second

// maxSocketPath is the length in bytes of the longest path of a socket, without its final zero (sun_path in unix(7)).
const maxSocketPath = len(unix.RawSockaddrUnix{}.Path) - 1

// Dial connects to the QMP Unix socket at path and negotiates capabilities. It fails with a *NotQMPError if the
// listener does not greet as QMP does, with a *BusyError if another client is connected, and with errors of
// connect(2), such as fs.ErrNotExist, which errors.Is finds.
func Dial(ctx context.Context, path string) (*Client, error) {
	var dialer net.Dialer
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("connect to the QMP socket: its path %s has %d bytes, at most %d are possible: "+
			"use a shorter one, such as a symbolic link to its directory", path, len(path), maxSocketPath)
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

// New negotiates capabilities on a connection that was already made. path names it in errors. via is the program that
// relays the messages, or empty if QEMU itself listens. The Client owns conn, unless New fails.
func New(ctx context.Context, conn *net.UnixConn, path, via string) (*Client, error) {
	peer, err := peerCredentials(conn)
	if err != nil {
		return nil, fmt.Errorf("who listens at %s: %w", path, err)
	}
	c := &Client{
		path:          path,
		via:           via,
		conn:          conn,
		peer:          peer,
		writeSlot:     make(chan struct{}, 1),
		fdSlot:        make(chan struct{}, 1),
		pending:       make(map[uint64]*call),
		subscriptions: make(map[*Subscription]struct{}),
		done:          make(chan struct{}),
	}
	c.lastID.Store(uint64(rand.Uint32()) << 16) // ids differ from those of the previous client, whose replies may be late
	limit := &io.LimitedReader{R: conn, N: maxMessage}
	buffered := bufio.NewReaderSize(limit, 64<<10)
	in := json.NewDecoder(buffered)

	ctx, cancel := context.WithTimeoutCause(ctx, greetingTimeout, fmt.Errorf("no greeting within %v", greetingTimeout))
	defer cancel()
	if c.version, err = c.readGreeting(ctx, buffered, in); err != nil {
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

// greeting is QEMU's first message to a client, or a message to the previous client that arrives before it.
type greeting struct {
	QMP *struct {
		Version struct {
			QEMU Version `json:"qemu"`
		} `json:"version"`
	} `json:"QMP"`
	Event  json.RawMessage `json:"event"`
	Return json.RawMessage `json:"return"`
	Error  json.RawMessage `json:"error"`
}

// isForPreviousClient says whether the message was meant for the previous client. QEMU's main thread may still write
// to that client after the monitor's thread has accepted the next connection, and before it sends the greeting
// (monitor_qmp_event and qmp_send_response in QEMU's monitor/qmp.c).
func (g greeting) isForPreviousClient() bool {
	return g.Event != nil || g.Return != nil || g.Error != nil
}

// readGreeting reads all messages up to the greeting: {"QMP": {"version": ..., "capabilities": [...]}}. Together they
// may have maxMessage bytes.
func (c *Client) readGreeting(ctx context.Context, buffered *bufio.Reader, in *json.Decoder) (Version, error) {
	expired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = c.conn.SetReadDeadline(time.Unix(1, 0)) // the connection is open
		close(expired)
	})
	first, err := buffered.Peek(1)
	if err == nil && first[0] != '{' {
		start, _ := buffered.Peek(min(buffered.Buffered(), 60)) // buffered bytes can be had without an error
		return Version{}, &NotQMPError{Path: c.path, Got: strings.TrimSpace(string(start))}
	}
	var g greeting
	for err == nil {
		g = greeting{}
		if err = in.Decode(&g); !g.isForPreviousClient() {
			break
		}
	}
	if !stop() {
		<-expired
	}
	switch {
	case err != nil:
		return Version{}, c.greetingError(ctx, err)
	case ctx.Err() != nil:
		return Version{}, c.greetingError(ctx, context.Cause(ctx))
	case g.QMP == nil:
		return Version{}, &NotQMPError{Path: c.path, Got: "{...}, a JSON object without the member QMP"}
	}
	return g.QMP.Version.QEMU, nil
}

// greetingError says why no greeting was received.
func (c *Client) greetingError(ctx context.Context, err error) error {
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
