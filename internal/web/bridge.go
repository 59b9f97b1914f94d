// SPDX-License-Identifier: Apache-2.0

package web

import (
	"context"
	"errors"
	"net"
	"strconv"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
)

// A Bridge passes calls from HTTP handlers to a gRPC server of the same process, so that HTTP and gRPC serve the same
// implementation. It also passes the caller: the context of a handler has a [peer.Peer], which the context of the
// server's method then has as well.
//
// The metadata of a call has a number that stands for the caller. It cannot be forged: no header of a request becomes
// that metadata (see traceHeaders), and only this process can reach the server.
type Bridge struct {
	listener *bufconn.Listener
	callers  sync.Map // number to *peer.Peer, of calls under way
	last     atomic.Uint64
}

const (
	callerKey = "migrated-caller"
	// bridgeBytes is how many bytes may be under way in one direction.
	bridgeBytes = 64 << 10
)

// NewBridge returns a Bridge. Closing its Listener closes it.
func NewBridge() *Bridge { return &Bridge{listener: bufconn.Listen(bridgeBytes)} }

// Listener returns the listener for the gRPC server.
func (b *Bridge) Listener() net.Listener { return b.listener }

// Dial connects to the gRPC server.
func (b *Bridge) Dial() (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///bridge",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return b.listener.DialContext(ctx)
		}),
		grpc.WithUnaryInterceptor(func(
			ctx context.Context, method string, request, reply any, conn *grpc.ClientConn,
			invoke grpc.UnaryInvoker, options ...grpc.CallOption,
		) error {
			ctx, leave, err := b.enter(ctx)
			if err != nil {
				return err
			}
			defer leave()
			return invoke(ctx, method, request, reply, conn, options...)
		}),
		grpc.WithStreamInterceptor(func(
			ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn, method string,
			open grpc.Streamer, options ...grpc.CallOption,
		) (grpc.ClientStream, error) {
			ctx, leave, err := b.enter(ctx)
			if err != nil {
				return nil, err
			}
			context.AfterFunc(ctx, leave) // the context of a request ends with the request
			return open(ctx, desc, conn, method, options...)
		}))
}

// errNobody says that the context of a call has no caller, which is a bug of the handler.
var errNobody = errors.New("a call over HTTP has no caller")

// enter adds the number of the caller in ctx to the metadata. The number is valid until leave is called.
func (b *Bridge) enter(ctx context.Context) (_ context.Context, leave func(), _ error) {
	caller, ok := peer.FromContext(ctx)
	if !ok {
		return nil, nil, errNobody
	}
	number := strconv.FormatUint(b.last.Add(1), 10)
	b.callers.Store(number, caller)
	return metadata.AppendToOutgoingContext(ctx, callerKey, number), func() { b.callers.Delete(number) }, nil
}

// ServerOptions returns options for the gRPC server that put the caller into the context of each call. They must come
// before options that need the caller.
func (b *Bridge) ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(func(
			ctx context.Context, request any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler,
		) (any, error) {
			ctx, err := b.caller(ctx)
			if err != nil {
				return nil, err
			}
			return handle(ctx, request)
		}),
		grpc.ChainStreamInterceptor(func(
			server any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handle grpc.StreamHandler,
		) error {
			ctx, err := b.caller(stream.Context())
			if err != nil {
				return err
			}
			return handle(server, &bridgedStream{stream, ctx})
		}),
	}
}

// caller returns ctx with the peer whose number is in the metadata.
func (b *Bridge) caller(ctx context.Context) (context.Context, error) {
	for _, number := range metadata.ValueFromIncomingContext(ctx, callerKey) {
		if caller, ok := b.callers.Load(number); ok {
			return peer.NewContext(ctx, caller.(*peer.Peer)), nil
		}
	}
	return nil, status.Error(codes.Unauthenticated, errNobody.Error())
}

type bridgedStream struct {
	grpc.ServerStream

	ctx context.Context //nolint:containedctx // what Context returns
}

func (s *bridgedStream) Context() context.Context { return s.ctx }
