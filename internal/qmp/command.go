// SPDX-License-Identifier: Apache-2.0

package qmp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

type command struct {
	Execute   string `json:"execute"`
	Arguments any    `json:"arguments,omitempty"`
	ID        uint64 `json:"id"`
}

// Do runs a command and waits for its reply. args is encoded as the arguments of the command unless it is nil; the
// value that QEMU returns is decoded into result unless that is nil.
//
// The error is an *Error if QEMU refused the command, and a *DisconnectedError if the connection ended. If ctx ends
// first, the error is its cause: it is then unknown whether QEMU has run or will run the command, but the connection
// stays usable.
func (c *Client) Do(ctx context.Context, execute string, args, result any) error {
	return c.do(ctx, execute, args, result, nil)
}

// DoWithFD is Do for a command that carries a descriptor ("getfd", "add-fd"). QEMU gets a duplicate; the caller
// keeps f.
//
// QEMU closes a descriptor when the next one arrives before the command of the first was run (tcp_chr_recv in
// chardev/char-socket.c), so each of these commands waits for the reply to the one before.
func (c *Client) DoWithFD(ctx context.Context, execute string, args, result any, f *os.File) error {
	return c.do(ctx, execute, args, result, f)
}

// Begin sends a command and does not wait for the reply. QEMU runs it before any command that is sent later. wait waits
// for the reply and returns the error that Do would; it may be called once.
func (c *Client) Begin(ctx context.Context, execute string, args any) (wait func(context.Context) error, err error) {
	waiting, err := c.begin(ctx, execute, args, nil)
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context) error { return c.finish(ctx, execute, nil, waiting) }, nil
}

func (c *Client) do(ctx context.Context, execute string, args, result any, f *os.File) error {
	waiting, err := c.begin(ctx, execute, args, f)
	if err != nil {
		return err
	}
	return c.finish(ctx, execute, result, waiting)
}

// begin encodes a command and sends it.
func (c *Client) begin(ctx context.Context, execute string, args any, f *os.File) (*call, error) {
	id := c.lastID.Add(1)
	line, err := json.Marshal(command{Execute: execute, Arguments: args, ID: id})
	if err != nil {
		return nil, fmt.Errorf("%s: encode the arguments: %w", execute, err)
	}
	waiting, err := c.submit(ctx, id, line, f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", execute, err)
	}
	return waiting, nil
}

// finish waits for the reply to a command that was sent, and decodes it.
func (c *Client) finish(ctx context.Context, execute string, result any, waiting *call) error {
	r, err := c.await(ctx, waiting)
	if err != nil {
		return fmt.Errorf("%s: %w", execute, err)
	}
	if r.Error != nil {
		r.Error.Command = execute
		return r.Error
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(r.Return, result); err != nil {
		return fmt.Errorf("%s: decode QEMU's reply: %w", execute, err)
	}
	return nil
}

// submit sends an encoded command with the given id, and f with it unless that is nil.
func (c *Client) submit(ctx context.Context, id uint64, line []byte, f *os.File) (*call, error) {
	waiting := &call{reply: make(chan reply, 1), holdsFDSlot: f != nil}
	if waiting.holdsFDSlot {
		if err := c.acquire(ctx, c.fdSlot); err != nil {
			return nil, err
		}
	}
	if err := c.send(ctx, id, waiting, line, f); err != nil {
		if waiting.holdsFDSlot {
			<-c.fdSlot
		}
		return nil, err
	}
	return waiting, nil
}

// await waits for the reply to a command that was sent.
func (c *Client) await(ctx context.Context, waiting *call) (reply, error) {
	select {
	case r := <-waiting.reply:
		return r, nil
	case <-ctx.Done():
		return reply{}, fmt.Errorf("no reply from QEMU: %w", context.Cause(ctx))
	case <-c.done:
	}
	select {
	case r := <-waiting.reply: // QEMU's last message
		return r, nil
	default:
		return reply{}, c.Err()
	}
}

// acquire waits for a slot until ctx or the connection ends.
func (c *Client) acquire(ctx context.Context, slot chan struct{}) error {
	select {
	case slot <- struct{}{}:
		return nil
	default:
	}
	select {
	case slot <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("not sent, an earlier command is still under way: %w", context.Cause(ctx))
	case <-c.done:
		return c.Err()
	}
}

// send writes a command, with a descriptor if f is not nil. An error means that no reply will come.
func (c *Client) send(ctx context.Context, id uint64, waiting *call, line []byte, f *os.File) error {
	if err := c.acquire(ctx, c.writeSlot); err != nil {
		return err
	}
	defer func() { <-c.writeSlot }()
	if err := context.Cause(ctx); err != nil {
		return err
	}

	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return c.err
	}
	c.pending[id] = waiting // before the reply can come
	c.mu.Unlock()

	n, err := c.write(ctx, line, f)
	if err == nil {
		return nil
	}
	c.mu.Lock()
	delete(c.pending, id)
	c.mu.Unlock()
	expired := errors.Is(err, os.ErrDeadlineExceeded)
	if n > 0 || !expired {
		// The connection is broken, or half a command was sent and QEMU would not understand what follows it.
		c.conn.Close()
	}
	if cause := context.Cause(ctx); cause != nil && expired {
		return fmt.Errorf("QEMU does not take the command: %w", cause)
	}
	if errors.Is(err, net.ErrClosed) {
		// The reader closes the connection when it fails, and knows why. It ends now.
		<-c.done
	}
	select {
	case <-c.done: // the reader has recorded the cause
		return c.Err()
	default:
		return &DisconnectedError{Path: c.path, Via: c.via, Cause: err}
	}
}

// write makes one system call for a whole command, unless the socket's buffer is full.
func (c *Client) write(ctx context.Context, line []byte, f *os.File) (n int, err error) {
	// A write blocks only if QEMU stopped reading long ago. Only the end of ctx sets the socket's deadline, so
	// that a command needs no timer.
	expired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = c.conn.SetWriteDeadline(time.Unix(1, 0)) // fails only on a closed connection, where the write fails too
		close(expired)
	})
	defer func() {
		if !stop() {
			<-expired
			_ = c.conn.SetWriteDeadline(time.Time{})
		}
	}()
	if f != nil {
		if n, err = c.writeWithFD(line, f); err != nil || n == len(line) {
			return n, err
		}
	}
	rest, err := c.conn.Write(line[n:])
	return n + rest, err
}

// writeWithFD may write a part of the line. The descriptor is sent with the first byte.
func (c *Client) writeWithFD(line []byte, f *os.File) (n int, err error) {
	raw, err := f.SyscallConn() // f.Fd() would make f blocking
	if err != nil {
		return 0, err
	}
	controlErr := raw.Control(func(fd uintptr) {
		n, _, err = c.conn.WriteMsgUnix(line, unix.UnixRights(int(fd)), nil)
	})
	if controlErr != nil {
		return 0, controlErr
	}
	return n, err
}
