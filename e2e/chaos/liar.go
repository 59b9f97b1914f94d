// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/pkg/pagewire"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// liarPort is the port, on the source, of the proxy between the destination and the source's pages.
const liarPort = "7601"

// between makes the source advertise the proxy's address for its pages while a journey lasts, and serves that address.
func (s *stage) between(f *fault, j *journey, serve func(net.Listener) (stop func(), err error)) {
	stop := func() {}
	f.arm = func(ctx context.Context) error {
		address := net.JoinHostPort(j.from.Addr, liarPort)
		var listener net.Listener
		err := j.from.InNetwork(func() (err error) {
			listener, err = net.Listen("tcp", address)
			return err
		})
		if err != nil {
			return err
		}
		if stop, err = serve(listener); err != nil {
			return errors.Join(err, listener.Close())
		}
		return s.restartDaemon(ctx, j.from, address)
	}
	f.disarm = func(ctx context.Context) error {
		stop()
		return s.restartDaemon(ctx, j.from, "")
	}
}

// damage flips a bit now and then in what the source sends, as a bad network card does.
func (s *stage) damage(f *fault, j *journey, r *rand.Rand) error {
	var bad atomic.Bool
	every := int64(1) << (12 + r.IntN(8)) // bytes
	seed := r.Uint64()
	f.detail = fmt.Sprintf("a bit of %d KiB", every>>10)
	s.between(f, j, func(listener net.Listener) (func(), error) {
		ctx, cancel := context.WithCancel(context.Background())
		go func() {
			for i := uint64(0); ; i++ {
				conn, err := listener.Accept()
				if err != nil {
					return // it was closed
				}
				go s.relay(ctx, conn, j.from, func(p []byte, random *rand.Rand) {
					if bad.Load() && random.Int64N(every) < int64(len(p)) {
						p[random.IntN(len(p))] ^= 1 << random.IntN(8)
					}
				}, rand.New(rand.NewPCG(seed, i)))
			}
		}()
		return func() {
			cancel()
			_ = listener.Close() // ends the loop
		}, nil
	})
	f.begin = func(context.Context) error { bad.Store(true); return nil }
	f.end = func(context.Context) error { bad.Store(false); return nil }
	return nil
}

// relay carries a connection to the daemon of h, and the daemon's data back through spoil.
func (s *stage) relay(
	ctx context.Context, conn net.Conn, h *lab.Host, spoil func([]byte, *rand.Rand), random *rand.Rand,
) {
	server, err := dialFrom(h)
	if err != nil {
		_ = conn.Close() // the other end notices
		return
	}
	stop := context.AfterFunc(ctx, func() {
		_ = server.Close() // both are only relayed
		_ = conn.Close()
	})
	defer stop()
	go func() {
		_, _ = io.Copy(server, conn) // if either ends, both do
		_ = server.Close()
	}()
	defer conn.Close()
	buffer := make([]byte, 64<<10)
	for {
		n, err := server.Read(buffer)
		if n > 0 {
			spoil(buffer[:n], random)
			if _, err := conn.Write(buffer[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// dialFrom connects to the daemon of h from its own network.
func dialFrom(h *lab.Host) (conn net.Conn, err error) {
	err = h.InNetwork(func() (err error) {
		conn, err = net.DialTimeout("tcp", h.DaemonAddr(), 5*time.Second)
		return err
	})
	return conn, err
}

// A lie turns a reply into another message, or into an error.
type lie struct {
	name string
	tell func(reply *pagewire.Reply) (instead any, err error)
}

// lies are messages that no source sends. None changes the content of a page, because a destination must trust the host
// that has the VM's memory.
var lies = []lie{
	{"a page that nobody asked for", func(r *pagewire.Reply) (any, error) {
		r.Runs[0].Offset ^= 64 << 20
		return r, nil
	}},
	{"a page behind the end of RAM", func(r *pagewire.Reply) (any, error) {
		r.Runs[0].Offset += 1 << 40
		return r, nil
	}},
	{"a page of a RAM block that does not exist", func(r *pagewire.Reply) (any, error) {
		r.Runs[0].Block += 7
		return r, nil
	}},
	{"half a page", func(r *pagewire.Reply) (any, error) {
		r.Runs[0].Offset += 2048
		return r, nil
	}},
	{"fewer bytes than pages", func(*pagewire.Reply) (any, error) {
		return &migratedv1.FetchResponse{Runs: []*migratedv1.PageRun{{Length: 4096}}, Data: make([]byte, 100)}, nil
	}},
	{"bytes that do not unpack", func(*pagewire.Reply) (any, error) {
		return &migratedv1.FetchResponse{
			Runs: []*migratedv1.PageRun{{Length: 4096}}, Data: []byte{0xff, 0xff, 0xff, 0xff},
			Compression: migratedv1.Compression_COMPRESSION_S2,
		}, nil
	}},
	{"no page, but an error", func(*pagewire.Reply) (any, error) {
		return nil, status.Error(codes.Internal, "a lie")
	}},
}

// lie puts a page server between the two that passes on the real one's replies. While the fault lasts, it lies once on
// each lane.
func (s *stage) lie(f *fault, j *journey, r *rand.Rand) error {
	told := lies[r.IntN(len(lies))]
	var lying atomic.Bool
	files := s.files(j.from)
	s.between(f, j, func(listener net.Listener) (func(), error) {
		creds, err := files.Client(j.from.DaemonAddr(), nil)
		if err != nil {
			return nil, err
		}
		dialer := func(context.Context, string) (net.Conn, error) { return dialFrom(j.from) }
		conn, err := grpc.NewClient("passthrough:///"+j.from.DaemonAddr(),
			append(pagewire.DialOptions(), grpc.WithTransportCredentials(creds), grpc.WithContextDialer(dialer))...)
		if err != nil {
			return nil, err
		}
		server := grpc.NewServer(append(pagewire.ServerOptions(), grpc.Creds(files.Server()))...)
		migratedv1.RegisterPageServiceServer(server, &liar{
			real: migratedv1.NewPageServiceClient(conn), lying: &lying, lie: told,
		})
		go func() { _ = server.Serve(listener) }() // it ends by Stop
		return func() {
			server.Stop()
			_ = conn.Close() // nothing is on its way
		}, nil
	})
	f.detail = told.name
	f.begin = func(context.Context) error { lying.Store(true); return nil }
	f.end = func(context.Context) error { lying.Store(false); return nil }
	return nil
}

// A liar is a page server that asks another one.
type liar struct {
	migratedv1.UnimplementedPageServiceServer
	real  migratedv1.PageServiceClient
	lying *atomic.Bool
	lie   lie
}

// Fetch serves one lane. It announces no compression to the real server, so that pages come unpacked.
func (l *liar) Fetch(stream migratedv1.PageService_FetchServer) error {
	given, _ := metadata.FromIncomingContext(stream.Context())
	asked := metadata.MD{}
	for _, key := range []string{pagewire.MigrationIDKey, pagewire.MigrationTokenKey, pagewire.LaneKey} {
		if values := given.Get(key); len(values) > 0 {
			asked.Set(key, values...)
		}
	}
	lane, err := l.real.Fetch(metadata.NewOutgoingContext(stream.Context(), asked))
	if err != nil {
		return err
	}
	if _, err := lane.Header(); err != nil {
		return err
	}
	if err := stream.SendHeader(nil); err != nil {
		return err
	}
	go func() {
		for {
			request := new(pagewire.Request)
			if err := stream.RecvMsg(request); err != nil {
				_ = lane.CloseSend() // it ends when its answers have come
				return
			}
			if lane.SendMsg(request) != nil {
				return // the lane is lost, as its answers say
			}
		}
	}()
	return l.answer(stream, lane)
}

func (l *liar) answer(stream migratedv1.PageService_FetchServer, lane migratedv1.PageService_FetchClient) error {
	lied := false
	var reply pagewire.Reply
	defer reply.Release()
	for {
		if err := lane.RecvMsg(&reply); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		var message any = &pagewire.Reply{Runs: reply.Runs, Data: reply.Data}
		if l.lying.Load() && !lied && len(reply.Runs) > 0 {
			lied = true
			var err error
			if message, err = l.lie.tell(&pagewire.Reply{Runs: reply.Runs, Data: reply.Data}); err != nil {
				return err
			}
		}
		if err := stream.SendMsg(message); err != nil {
			return fmt.Errorf("pass a reply on: %w", err)
		}
	}
}
