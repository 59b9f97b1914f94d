// SPDX-License-Identifier: Apache-2.0

package report

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"
)

// Port is a connection to a guest's serial port that QEMU offers as a Unix socket
// (-serial unix:PATH,server=on,wait=off).
type Port struct {
	conn net.Conn
	log  *Log
	done chan struct{}
	err  error // valid when done is closed
}

// Open connects to the socket at path, waiting for QEMU to offer it, and follows it into log until either side closes
// it. The caller owns the port and closes it; log outlives it.
func Open(ctx context.Context, path string, log *Log) (*Port, error) {
	conn, err := Dial(ctx, path)
	if err != nil {
		return nil, err
	}
	p := &Port{conn: conn, log: log, done: make(chan struct{})}
	go func() {
		defer close(p.done)
		if err := log.Follow(conn); !errors.Is(err, net.ErrClosed) && !errors.Is(err, syscall.ECONNRESET) {
			p.err = err
		}
	}()
	return p, nil
}

// Done returns a channel that is closed with the port: when QEMU ends, or Close is called.
func (p *Port) Done() <-chan struct{} { return p.done }

// Close closes the connection and waits until all that was read is in the log.
func (p *Port) Close() error {
	err := p.conn.Close()
	<-p.done
	return errors.Join(err, p.err)
}

var commandID atomic.Uint64

// Verify makes the guest check all its memory and returns its answer. Damage is no error of Verify; see Log.Err.
func (p *Port) Verify(ctx context.Context) (*Verified, error) {
	id := strconv.FormatUint(commandID.Add(1), 10)
	line, err := p.command(ctx, "verify "+id, func(l Line) bool { return l.Verified != nil && l.Verified.ID == id })
	if err != nil {
		return nil, err
	}
	return line.Verified, nil
}

// SetLoad switches the guest's load on or off and waits until that is done.
func (p *Port) SetLoad(ctx context.Context, on bool) (*State, error) {
	name := "stop "
	if on {
		name = "load "
	}
	id := strconv.FormatUint(commandID.Add(1), 10)
	line, err := p.command(ctx, name+id, func(l Line) bool { return l.State != nil && l.State.ID == id })
	if err != nil {
		return nil, err
	}
	return line.State, nil
}

// PowerOff asks the guest to power off. Done is closed when QEMU has ended.
func (p *Port) PowerOff() error {
	_, err := io.WriteString(p.conn, "poweroff\n")
	return err
}

// Panic makes the guest's kernel panic. The guest then boots anew.
func (p *Port) Panic() error {
	_, err := io.WriteString(p.conn, "panic\n")
	return err
}

func (p *Port) command(ctx context.Context, command string, match func(Line) bool) (Line, error) {
	from := p.log.Len()
	if _, err := io.WriteString(p.conn, command+"\n"); err != nil {
		return Line{}, fmt.Errorf("guest command %q: %w", command, err)
	}
	line, _, err := p.log.Wait(ctx, from, match)
	if err != nil {
		return Line{}, fmt.Errorf("guest command %q: %w", command, err)
	}
	return line, nil
}

// Dial connects to a Unix socket, waiting for it to appear.
func Dial(ctx context.Context, path string) (net.Conn, error) {
	var d net.Dialer
	for {
		conn, err := d.DialContext(ctx, "unix", path)
		if err == nil {
			return conn, nil
		}
		if !errors.Is(err, syscall.ENOENT) && !errors.Is(err, syscall.ECONNREFUSED) {
			return nil, fmt.Errorf("guest's serial port: %w", err)
		}
		select {
		case <-time.After(pollInterval):
		case <-ctx.Done():
			return nil, fmt.Errorf("guest's serial port: %w (%w)", err, context.Cause(ctx))
		}
	}
}
