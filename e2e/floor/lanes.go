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
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"

	"github.com/migrated-vm/migrated/internal/gomaxprocs"
	"github.com/migrated-vm/migrated/internal/pki"
	"github.com/migrated-vm/migrated/pkg/pagelane"
	"github.com/migrated-vm/migrated/pkg/pagewire"
	"github.com/migrated-vm/migrated/pkg/postcopy"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// workers is the default of the engine.
const workers = 2

type lanes struct {
	demand []postcopy.Lane
	bulk   postcopy.Lane
	close  func()
}

// openLanes opens the lanes through which the job's pages come. Each kind of lane has all that the kinds before it
// have, and one thing more:
//
//	instant  no source: a lane answers by itself, from a buffer
//	memory   a page server in this process, at the other end of two channels
//	pipe     HTTP/2, over a connection in the memory of this process
//	local    over loopback TCP, within this process
//	remote   the page server in a process of its own
//
// tls is remote with mutual TLS, as daemons use it; plain is remote without HTTP/2 and without the page server; grpc is
// remote with the transport of gRPC's library.
func openLanes(ctx context.Context, j job) (*lanes, error) {
	switch j.Lane {
	case "instant":
		return instantLanes(ctx), nil
	case "remote":
		return dial(ctx, j.UFFDs, tcpDialer(addresses(j).grpc, insecure.NewCredentials()))
	case "tls":
		address := addresses(j).tls
		creds, err := pki.FilesIn(j.TLS).Client(address, nil)
		if err != nil {
			return nil, err
		}
		return dial(ctx, j.UFFDs, tcpDialer(address, creds))
	case "grpc":
		return dialGRPC(ctx, j.UFFDs, addresses(j).grpc)
	case "plain":
		return plainLanes(ctx, addresses(j).plain)
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
		r.serve(listener, insecure.NewCredentials())
		return dial(ctx, j.UFFDs, listener.DialContext)
	case "local":
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		r.serve(listener, insecure.NewCredentials())
		return dial(ctx, j.UFFDs, tcpDialer(listener.Addr().String(), insecure.NewCredentials()))
	}
	return nil, fmt.Errorf("no lane is called %q", j.Lane)
}

type dialer = func(context.Context) (net.Conn, error)

func tcpDialer(address string, creds credentials.TransportCredentials) dialer {
	return func(ctx context.Context) (net.Conn, error) {
		return pagelane.Dial(ctx, address, creds, gomaxprocs.Add)
	}
}

// sourceAddresses are the addresses of a source: of its page service, of its pages without gRPC, and of its page
// service by TLS.
type sourceAddresses struct{ grpc, plain, tls string }

// addresses parses the addresses that source has printed.
func addresses(j job) (a sourceAddresses) {
	a.grpc, a.plain, _ = strings.Cut(j.Address, ",")
	a.plain, a.tls, _ = strings.Cut(a.plain, ",")
	return a
}

// dial opens the lanes for RAM in so many blocks, each on a connection of its own, as the daemon does.
func dial(ctx context.Context, blocks int, d dialer) (*lanes, error) {
	ctx, cancel := context.WithCancel(ctx)
	l := &lanes{close: cancel}
	for i := range workers + 1 {
		conn, err := d(ctx)
		if err == nil {
			var lane *pagelane.Client
			if lane, err = pagelane.Open(ctx, conn, calling(blocks, i == workers)); err == nil {
				l.add(lane)
				continue
			}
		}
		cancel()
		return nil, fmt.Errorf("open a lane: %w", err)
	}
	return l, nil
}

// dialGRPC opens the lanes through gRPC's library, as any other program would.
func dialGRPC(ctx context.Context, blocks int, address string) (*lanes, error) {
	ctx, cancel := context.WithCancel(metadata.NewOutgoingContext(ctx, calling(blocks, false)))
	l := &lanes{close: cancel}
	for range workers + 1 {
		conn, err := grpc.NewClient("passthrough:///"+address,
			append(pagewire.DialOptions(), grpc.WithTransportCredentials(insecure.NewCredentials()))...)
		if err != nil {
			return nil, errors.Join(err, ctx.Err())
		}
		context.AfterFunc(ctx, func() { _ = conn.Close() })
		call, abort := context.WithCancel(ctx)
		stream, err := migratedv1.NewPageServiceClient(conn).Fetch(call)
		if err == nil {
			_, err = stream.Header()
		}
		if err != nil {
			abort()
			cancel()
			return nil, fmt.Errorf("open a lane: %w", err)
		}
		l.add(called{pagewire.ClientStream{ClientStream: stream}, abort})
	}
	return l, nil
}

// called is a lane over a call of gRPC's library.
type called struct {
	pagewire.ClientStream
	abort context.CancelFunc
}

func (c called) Abort() { c.abort() }

func (l *lanes) add(lane postcopy.Lane) {
	if len(l.demand) < workers {
		l.demand = append(l.demand, lane)
	} else {
		l.bulk = lane
	}
}

func calling(blocks int, bulk bool) metadata.MD {
	return pagewire.Call{ID: strconv.Itoa(max(1, blocks)), Token: token, Bulk: bulk}.Metadata()
}

// gated is a bulk lane that passes nothing until it is opened. The sweep is on, so that a fault asks for one page only,
// but leaves all pages to the faults.
type gated struct {
	postcopy.Lane
	open chan struct{}
	ctx  context.Context //nolint:containedctx // it ends the lane
}

func (g *gated) Send(request *pagewire.Request) error {
	select {
	case <-g.open:
		return g.Lane.Send(request)
	case <-g.ctx.Done():
		return g.ctx.Err()
	}
}
