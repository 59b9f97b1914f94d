// SPDX-License-Identifier: Apache-2.0

// Package tcpkeepalive makes TCP detect a dead host, and recover soon after the network is back.
package tcpkeepalive

import (
	"context"
	"errors"
	"net"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/pagelane/netconn"
)

const (
	// Quiet is the idle time after which TCP probes the other side.
	Quiet = 10 * time.Second
	// Answer is how long the answer may take. A half-open connection is detected within Quiet + Answer.
	Answer = 5 * time.Second
	// repeat is the longest time between two retransmissions; TCP accepts no shorter one. By itself TCP doubles the time
	// at each attempt: a host that was cut off for ten seconds would stay so for twenty.
	repeat = time.Second
)

// Dial connects to address, HOST:PORT, and calls Keep for the connection.
func Dial(ctx context.Context, address string) (net.Conn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	if err := Keep(c); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// Keep sets these times for a TCP connection, and does nothing for others. The kernel sends the probes, by the
// monotonic clock. gRPC's keepalive uses the wall clock (lastRead in grpc/internal/transport): if that is set back by
// years, it does not check a connection for as long.
func Keep(c net.Conn) error {
	tcp, ok := netconn.Find[*net.TCPConn](c)
	if !ok {
		return nil
	}
	if err := tcp.SetKeepAliveConfig(net.KeepAliveConfig{
		Enable: true, Idle: Quiet, Interval: Answer, Count: 1,
	}); err != nil {
		return err
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return err
	}
	controlErr := raw.Control(func(fd uintptr) { err = keep(int(fd)) })
	return errors.Join(controlErr, err)
}

// keep sets what package net has no names for: tcp(7), and TCP_RTO_MAX_MS of Linux 6.15.
func keep(fd int) error {
	err := errors.Join(
		// Without it, what was sent into a cut cable is repeated for a quarter of an hour.
		unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int((Quiet+Answer).Milliseconds())),
		// The first six times at the same interval, where less than four packets are on their way: a fault and its page.
		unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_THIN_LINEAR_TIMEOUTS, 1),
	)
	if longest := unix.SetsockoptInt(
		fd, unix.IPPROTO_TCP, unix.TCP_RTO_MAX_MS, int(repeat.Milliseconds()),
	); !errors.Is(longest, unix.ENOPROTOOPT) {
		err = errors.Join(err, longest)
	}
	return err
}
