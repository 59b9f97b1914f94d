// SPDX-License-Identifier: Apache-2.0

// Package alive has TCP notice a host that is gone, and go on soon after a network is back.
package alive

import (
	"context"
	"errors"
	"net"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/within"
)

const (
	// Quiet is how long a connection may carry nothing until the other side is asked whether it is there.
	Quiet = 10 * time.Second
	// Answer is how long that may take. Two daemons notice a half-open connection within the sum of both.
	Answer = 5 * time.Second
	// repeat is the longest that TCP waits until it sends again what was not acknowledged, and the least that it can be
	// told. By itself it waits twice as long each time: who was cut off for ten seconds would be for twenty.
	repeat = time.Second
)

// Dial connects to address, HOST:PORT, and keeps the connection so.
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

// Keep sets that for a connection of TCP; others are left as they are. It is the kernel that asks, by the monotonic clock:
// gRPC's keepalive goes by the wall clock (lastRead in grpc/internal/transport), and where that is put back by years, does not
// look at a connection again for as long.
func Keep(c net.Conn) error {
	tcp, ok := within.Conn[*net.TCPConn](c)
	if !ok {
		return nil
	}
	if err := tcp.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: Quiet, Interval: Answer, Count: 1}); err != nil {
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
	if longest := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_RTO_MAX_MS, int(repeat.Milliseconds())); !errors.Is(longest, unix.ENOPROTOOPT) {
		err = errors.Join(err, longest)
	}
	return err
}
