// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
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

	"github.com/migrated-vm/migrated/internal/mtls"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// client is the control API of one daemon. It connects at its first call.
type client struct {
	migratedv1.ControlServiceClient
	conn   *grpc.ClientConn
	target *target
	app    *app
}

// connect makes the client for the daemon that the flags name. The caller
// closes its conn.
func (a *app) connect() (*client, error) {
	t, err := parseTarget(a.daemon)
	if err != nil {
		return nil, &failure{exit: exitUsage, message: err.Error(),
			remedy: "give --daemon or MIGRATED_DAEMON as unix:///PATH or HOST:PORT"}
	}
	creds, err := a.credentials(t)
	if err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient("passthrough:///"+t.address,
		grpc.WithUnaryInterceptor(a.readAnswer),
		grpc.WithStreamInterceptor(a.readStream),
		grpc.WithTransportCredentials(creds),
		grpc.WithAuthority("localhost"), // a socket's path is none
		grpc.WithNoProxy(),
		grpc.WithContextDialer(t.dial),
		// A daemon that is just starting is there within moments.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.5, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: 5 * time.Second,
		}))
	if err != nil {
		return nil, fmt.Errorf("preparing the connection to %s: %w", a.daemon, err)
	}
	return &client{migratedv1.NewControlServiceClient(conn), conn, t, a}, nil
}

// credentials are plain for a socket and for this host alone, unless a certificate is given.
func (a *app) credentials(t *target) (credentials.TransportCredentials, error) {
	encrypt := a.tls != mtls.Files{}
	switch {
	case t.network == "unix" || !encrypt && (a.plaintext || mtls.Loopback(t.address)):
		return insecure.NewCredentials(), nil
	case !encrypt:
		return nil, &failure{exit: exitUsage, message: "no connection without encryption to " + t.address,
			remedy: "give --tls-certificate, --tls-key and --tls-ca; or --plaintext, where nobody else is on the network"}
	}
	creds, err := a.tls.Client(t.address, nil)
	if err != nil {
		return nil, &failure{exit: exitUsage, message: err.Error(), remedy: "give --tls-certificate, --tls-key and --tls-ca, all three"}
	}
	return creds, nil
}

// withClient calls do with a client and a context that --timeout bounds.
func (a *app) withClient(do func(ctx context.Context, c *client) error) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	defer c.conn.Close()
	ctx, cancel := context.WithTimeout(a.ctx, a.timeout)
	defer cancel()
	return do(ctx, c)
}

// target is the address of a daemon. It keeps what the last attempt to connect
// said, because gRPC passes that on as text alone.
type target struct {
	network, address string // as for net.Dial

	mu   sync.Mutex
	last error
}

// parseTarget reads unix:///PATH, unix:PATH, an absolute path, or HOST:PORT.
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

// unixPath returns the path of the socket, ok where it is one.
func (t *target) unixPath() (path string, ok bool) { return t.address, t.network == "unix" }

func (t *target) dial(ctx context.Context, address string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, t.network, address)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.last = err
	return conn, err
}

// lastError returns what the last attempt to connect said, nil where it
// succeeded or there was none.
func (t *target) lastError() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.last
}
