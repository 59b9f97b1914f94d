// SPDX-License-Identifier: Apache-2.0

// Package client is the control API of migrated for Go programs: orchestrators, and migrated's own command line.
//
//	Dial         connects to the daemon of a host
//	Client       has every method of the API; its errors are *Error
//	Migrate      moves a VM, and waits until all of its memory is there
//	Wait         waits for a migration that was started before
//	Follower     keeps a current list of a host's migrations, and reports changes
//
// A migration runs without its client. A program that was started again, or lost its connection, calls Migrate again
// with the same id: it then waits for the same migration.
package client

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/migrated-vm/migrated/pkg/mtls"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// Options say how to connect to a daemon. The zero value is for a socket, and for a daemon of this host.
type Options struct {
	// TLS are this program's certificate and the authorities that it trusts. A daemon of another host needs them.
	TLS mtls.Files
	// Plaintext permits connections to another host without encryption.
	Plaintext bool
	// Dial are further options of gRPC, such as interceptors.
	Dial []grpc.DialOption
}

// Client is the control API of one daemon. It connects at its first call, and again when the connection was lost.
// All errors of its methods, and of the streams that they return, are *Error.
type Client struct {
	migratedv1.ControlServiceClient
	migratedv1.EvacuationServiceClient

	conn   *grpc.ClientConn
	target *target
}

// ErrEncryption says that Dial refused an unencrypted connection to another host.
var ErrEncryption = errors.New("refusing an unencrypted connection")

// Dial makes a client of a daemon. The address is unix:///PATH, the absolute path of a socket, or HOST:PORT. Dial does
// not connect yet. The caller must Close the client.
func Dial(daemon string, o Options) (*Client, error) {
	t, err := parseTarget(daemon)
	if err != nil {
		return nil, err
	}
	creds, err := t.credentials(o)
	if err != nil {
		return nil, err
	}
	options := append([]grpc.DialOption{
		// These interceptors are the outermost: those of the caller see statuses, not *Error.
		grpc.WithChainUnaryInterceptor(t.unary), grpc.WithChainStreamInterceptor(t.stream),
		grpc.WithTransportCredentials(creds),
		grpc.WithAuthority("localhost"), // the path of a socket is no authority
		grpc.WithNoProxy(),
		grpc.WithContextDialer(t.dial),
		// A daemon that is just starting answers soon: try again early.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{
				BaseDelay: 50 * time.Millisecond, Multiplier: 1.5, Jitter: 0.2, MaxDelay: time.Second,
			},
			MinConnectTimeout: 5 * time.Second,
		}),
	}, o.Dial...)
	conn, err := grpc.NewClient("passthrough:///"+t.address, options...)
	if err != nil {
		return nil, fmt.Errorf("prepare the connection to %s: %w", daemon, err)
	}
	return &Client{migratedv1.NewControlServiceClient(conn), migratedv1.NewEvacuationServiceClient(conn), conn, t}, nil
}

// Close closes the connection and ends every call that is under way.
func (c *Client) Close() error { return c.conn.Close() }

// SocketPath is the path of the daemon's socket. ok is false if the client uses HOST:PORT.
func (c *Client) SocketPath() (path string, ok bool) {
	return c.target.address, c.target.network == "unix"
}

// target is the address of a daemon. It keeps the error of the last attempt to connect, because gRPC returns it only as
// text.
type target struct {
	network, address string // as for net.Dial

	mu   sync.Mutex
	last error
}

// SocketPath parses the address of a daemon, as Dial does, and returns the path of its socket. The path is empty for
// HOST:PORT.
func SocketPath(daemon string) (string, error) {
	t, err := parseTarget(daemon)
	if err != nil || t.network != "unix" {
		return "", err
	}
	return t.address, nil
}

func parseTarget(daemon string) (*target, error) {
	path, isUnix := strings.CutPrefix(daemon, "unix:")
	if isUnix && strings.HasPrefix(path, "//") {
		path = strings.TrimPrefix(path, "//")
	}
	switch {
	case isUnix && path == "":
		return nil, fmt.Errorf("%q names no socket", daemon)
	case isUnix || filepath.IsAbs(daemon):
		return &target{network: "unix", address: path}, nil
	}
	if _, _, err := net.SplitHostPort(daemon); err != nil {
		return nil, fmt.Errorf("%q is not the address of a daemon: %w", daemon, err)
	}
	return &target{network: "tcp", address: daemon}, nil
}

// credentials returns TLS credentials, or plain ones. A socket always uses plain ones. HOST:PORT uses TLS if o.TLS is
// set; without it, only Plaintext or an address of this host permits plain ones.
func (t *target) credentials(o Options) (credentials.TransportCredentials, error) {
	encrypt := o.TLS != (mtls.Files{})
	switch {
	case t.network == "unix" || !encrypt && (o.Plaintext || loopback(t.address)):
		return insecure.NewCredentials(), nil
	case !encrypt:
		return nil, fmt.Errorf("%w to %s", ErrEncryption, t.address)
	}
	return o.TLS.Client(t.address, nil)
}

// loopback reports whether address, HOST:PORT, cannot be reached from another host.
func loopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	ip := net.ParseIP(host)
	return err == nil && (host == "localhost" || ip != nil && ip.IsLoopback())
}

func (t *target) dial(ctx context.Context, address string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, t.network, address)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.last = err
	return conn, err
}

// lastError is the error of the last attempt to connect. It is nil if that succeeded, or if there was none.
func (t *target) lastError() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.last
}

// unary is an interceptor. It turns the errors of calls into *Error.
func (t *target) unary(
	ctx context.Context, method string, request, answer any, cc *grpc.ClientConn, call grpc.UnaryInvoker,
	opts ...grpc.CallOption,
) error {
	return t.explain(call(ctx, method, request, answer, cc, opts...))
}

// stream is an interceptor. It turns the errors of streams into *Error.
func (t *target) stream(
	ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer,
	opts ...grpc.CallOption,
) (grpc.ClientStream, error) {
	s, err := open(ctx, desc, cc, method, opts...)
	if err != nil {
		return nil, t.explain(err)
	}
	return &explained{s, t}, nil
}

// explained is a stream whose RecvMsg returns *Error.
type explained struct {
	grpc.ClientStream

	target *target
}

// RecvMsg receives a message from the stream.
func (s *explained) RecvMsg(m any) error { return s.target.explain(s.ClientStream.RecvMsg(m)) }
