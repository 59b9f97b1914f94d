// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/migrated-vm/migrated/e2e/lab"
)

// Settings for trying a link without a migration. There are several connections because one connection's window may be
// too small for a long round trip.
const (
	bareConnections = 4
	bareFor         = pathAfter + 5*time.Second
	barePiece       = 256 << 10
)

// bareTCP fills in how much of the link bare TCP uses while the VM stays where it is. No contender can use more on this
// machine, because the link is emulated on the same CPUs.
func (s *scene) bareTCP(ctx context.Context, f *figures) (err error) {
	ctx, cancel := context.WithTimeout(ctx, bareFor)
	defer cancel()
	from, to := s.at, s.lab.Other(s.at)
	var listener net.Listener
	if err := to.InNetwork(func() (err error) {
		listener, err = net.Listen("tcp4", net.JoinHostPort(to.Addr, "0"))
		return err
	}); err != nil {
		return fmt.Errorf("bare TCP over the link: %w", err)
	}
	var threads sync.WaitGroup
	defer threads.Wait()
	defer func() { err = errors.Join(err, listener.Close()) }()
	threads.Go(func() { discardAll(listener, &threads) })
	wire := s.watchWire(from)
	defer wire.end()
	wire.runs()
	began := time.Now()
	failures := make([]error, bareConnections)
	var senders sync.WaitGroup
	for i := range failures {
		senders.Go(func() { failures[i] = sendUntil(ctx, from, listener.Addr().String()) })
	}
	senders.Wait()
	ended := time.Now()
	wire.end()
	f.ofWire(wire, began, ended)
	return errors.Join(failures...)
}

// discardAll accepts connections and discards what they carry. It returns when the listener is closed, and its threads
// when their connections end.
func discardAll(listener net.Listener, threads *sync.WaitGroup) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		threads.Go(func() {
			defer conn.Close()
			_, _ = io.Copy(io.Discard, conn) // it ends with the sender
		})
	}
}

// sendUntil sends over one connection until the context ends.
func sendUntil(ctx context.Context, from *lab.Host, address string) error {
	var conn net.Conn
	if err := from.InNetwork(func() (err error) {
		conn, err = (&net.Dialer{}).DialContext(ctx, "tcp4", address)
		return err
	}); err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) })
	defer stop()
	piece := make([]byte, barePiece)
	for {
		if _, err := conn.Write(piece); err != nil {
			if ctx.Err() != nil {
				return nil // the context ended it
			}
			return err
		}
	}
}
