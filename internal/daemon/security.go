// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/internal/mtls"
)

// secured is what makes a server on a network secure: mutual TLS, if there is any, and a check of who calls, which refuses
// all but those callers whom allow allows.
func (d *Daemon) secured(allow mtls.Allow) (credentials.TransportCredentials, func(context.Context) error) {
	files, encrypted := d.cfg.TLS()
	if !encrypted {
		return insecure.NewCredentials(), func(context.Context) error { return nil }
	}
	return files.Server(), func(ctx context.Context) error {
		err := allow(callerNames(ctx))
		if err == nil {
			return nil
		}
		d.log.Warn("refused a caller", "error", err)
		return status.Error(codes.PermissionDenied, err.Error())
	}
}

// refusing are the options of a server that refuses calls. Callers are told so by a status: an alert in the handshake
// would reach them as a broken connection.
func refusing(refuse func(context.Context) error) []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(func(ctx context.Context, request any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
			if err := refuse(ctx); err != nil {
				return nil, err
			}
			return handle(ctx, request)
		}),
		grpc.ChainStreamInterceptor(func(server any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
			if err := refuse(stream.Context()); err != nil {
				return err
			}
			return handle(server, stream)
		}),
	}
}

// callerNames are those in the caller's certificate.
func callerNames(ctx context.Context) []string {
	caller, ok := peer.FromContext(ctx)
	if !ok {
		return nil
	}
	return mtls.Names(caller.AuthInfo)
}

// dialCredentials are for a connection to another daemon.
func (d *Daemon) dialCredentials(address string) (credentials.TransportCredentials, error) {
	files, encrypted := d.cfg.TLS()
	switch {
	case encrypted:
		peers := d.cfg.PeerList()
		if len(peers) == 0 {
			return files.Client(address, nil)
		}
		return files.Client(address, peers.Allow)
	case d.cfg.Plaintext || mtls.Loopback(address):
		return insecure.NewCredentials(), nil
	}
	return nil, fmt.Errorf("no connection without encryption to %s: set tls_certificate, tls_key and tls_ca, or plaintext "+
		"where nobody but hypervisors is on the network", address)
}

// maySend refuses a caller who may not send that VM here.
func (d *Daemon) maySend(ctx context.Context, vm string) error {
	if err := d.cfg.PeerList().MaySend(callerNames(ctx), vm); err != nil {
		d.log.Warn("refused a VM", "error", err)
		return status.Errorf(codes.PermissionDenied, "%v; its entry among the destination's peers says which it may", err)
	}
	return nil
}
