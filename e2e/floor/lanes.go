// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"

	"github.com/migrated-vm/migrated/internal/pagelane"
	"github.com/migrated-vm/migrated/internal/pagewire"
	"github.com/migrated-vm/migrated/pkg/postcopy"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// workers is the engine's own default.
const workers = 2

type lanes struct {
	demand []postcopy.Lane
	bulk   postcopy.Lane
	close  func()
}

// openLanes opens what the job's pages come through. Each way has all that the ones before it have, and one thing more:
//
//	instant  no source: a lane answers by itself, from a buffer
//	memory   a page server in this process, at the other end of two channels
//	pipe     HTTP/2, over a connection in the memory of this process
//	local    over loopback TCP, within this process
//	remote   the page server in a process of its own
//
// plain is remote without HTTP/2 and without the page server, grpc is remote with the transport of gRPC's library.
func openLanes(ctx context.Context, j job) (*lanes, error) {
	switch j.Lane {
	case "instant":
		return instantLanes(ctx), nil
	case "remote":
		address, _ := addresses(j)
		return dial(ctx, j.UFFDs, tcpDialer(address))
	case "grpc":
		address, _ := addresses(j)
		return dialGRPC(ctx, j.UFFDs, address)
	case "plain":
		_, address := addresses(j)
		return plainLanes(ctx, address)
	}
	r, err := openRAM(j.Size, j.Pages)
	if err != nil {
		return nil, err
	}
	switch j.Lane {
	case "memory":
		return memoryLanes(ctx, r.server, j.UFFDs), nil
	case "pipe":
		listener := bufconn.Listen(1 << 20)
		r.serve(listener)
		return dial(ctx, j.UFFDs, listener.DialContext)
	case "local":
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		r.serve(listener)
		return dial(ctx, j.UFFDs, tcpDialer(listener.Addr().String()))
	}
	return nil, fmt.Errorf("no lane is called %q", j.Lane)
}

type dialer = func(context.Context) (net.Conn, error)

func tcpDialer(address string) dialer {
	return func(ctx context.Context) (net.Conn, error) {
		return pagelane.Dial(ctx, address, insecure.NewCredentials())
	}
}

// addresses are those of the source's page service and of its pages without gRPC.
func addresses(j job) (grpc, plain string) {
	grpc, plain, _ = strings.Cut(j.Address, ",")
	return grpc, plain
}

// dial opens the lanes of the RAM in so many blocks, each on a connection of its own, as the daemon does.
func dial(ctx context.Context, blocks int, d dialer) (*lanes, error) {
	ctx, cancel := context.WithCancel(ctx)
	l := &lanes{close: cancel}
	for range workers + 1 {
		conn, err := d(ctx)
		if err == nil {
			var lane *pagelane.Client
			if lane, err = pagelane.Open(ctx, conn, calling(blocks)); err == nil {
				l.add(lane)
				continue
			}
		}
		cancel()
		return nil, fmt.Errorf("open a lane: %w", err)
	}
	return l, nil
}

// dialGRPC does it through gRPC's library, as any other program would.
func dialGRPC(ctx context.Context, blocks int, address string) (*lanes, error) {
	ctx, cancel := context.WithCancel(metadata.NewOutgoingContext(ctx, calling(blocks)))
	l := &lanes{close: cancel}
	for range workers + 1 {
		conn, err := grpc.NewClient("passthrough:///"+address, append(pagewire.DialOptions(), grpc.WithTransportCredentials(insecure.NewCredentials()))...)
		if err != nil {
			return nil, errors.Join(err, ctx.Err())
		}
		context.AfterFunc(ctx, func() { _ = conn.Close() })
		stream, err := migratedv1.NewPageServiceClient(conn).Fetch(ctx)
		if err == nil {
			_, err = stream.Header()
		}
		if err != nil {
			cancel()
			return nil, fmt.Errorf("open a lane: %w", err)
		}
		l.add(stream)
	}
	return l, nil
}

func (l *lanes) add(lane postcopy.Lane) {
	if len(l.demand) < workers {
		l.demand = append(l.demand, lane)
	} else {
		l.bulk = lane
	}
}

func calling(blocks int) metadata.MD {
	return metadata.Pairs(pagewire.MigrationIDKey, strconv.Itoa(max(1, blocks)), pagewire.MigrationTokenKey, token)
}

// gated is a bulk lane through which nothing goes until it is opened: the sweep is on, so that a fault asks for one
// page, and leaves all pages to the faults.
type gated struct {
	postcopy.Lane
	open chan struct{}
	ctx  context.Context //nolint:containedctx // it is the life of this struct
}

func (g *gated) SendMsg(m any) error {
	select {
	case <-g.open:
		return g.Lane.SendMsg(m)
	case <-g.ctx.Done():
		return g.ctx.Err()
	}
}
