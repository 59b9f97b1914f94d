// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"fmt"
	"net"
	"net/netip"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/internal/alive"
	"github.com/migrated-vm/migrated/internal/limits"
	"github.com/migrated-vm/migrated/internal/mtls"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// network is how a server is reached by other hosts: by mutual TLS, if there is any, only by those callers whom refuse lets
// in, and by nobody beyond what package limits grants.
type network struct {
	net.Listener // of the connections that there is room for

	creds   credentials.TransportCredentials
	refuse  func(context.Context) error
	options []grpc.ServerOption // without creds
}

// network makes one of a listener for those whom allow allows. Others are told so by a status: an alert in the handshake
// would reach them as a broken connection.
func (d *Daemon) network(listener net.Listener, allow mtls.Allow) *network {
	peers := limits.NewPeers(d.refusals)
	n := &network{
		Listener: peers.Listener(listener),
		creds:    insecure.NewCredentials(),
		refuse:   func(context.Context) error { return nil },
	}
	if files, encrypted := d.cfg.TLS(); encrypted {
		n.creds = files.Server()
		n.refuse = func(ctx context.Context) error {
			err := allow(callerNames(ctx))
			if err == nil {
				return nil
			}
			d.refusals.Refused(limits.Caller, callerNetwork(ctx), "error", err)
			return status.Error(codes.PermissionDenied, err.Error())
		}
	}
	n.creds = limits.Handshake(n.creds)
	n.options = []grpc.ServerOption{
		grpc.ConnectionTimeout(limits.HandshakeTime),
		grpc.MaxConcurrentStreams(limits.Streams),
		grpc.MaxHeaderListSize(limits.HeaderBytes),
		grpc.MaxRecvMsgSize(limits.MessageBytes),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: alive.Quiet / 2, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			Time: alive.Quiet, Timeout: alive.Answer, MaxConnectionIdle: limits.IdleTime,
		}),
		peers.Calls(migratedv1.PeerService_PrepareIncoming_FullMethodName, migratedv1.PeerService_CheckHost_FullMethodName),
		grpc.ChainUnaryInterceptor(func(ctx context.Context, request any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
			if err := n.refuse(ctx); err != nil {
				return nil, err
			}
			return handle(ctx, request)
		}),
		grpc.ChainStreamInterceptor(func(server any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
			if err := n.refuse(stream.Context()); err != nil {
				return err
			}
			return handle(server, stream)
		}),
	}
	return n
}

// callerNetwork is what the caller's address counts as.
func callerNetwork(ctx context.Context) netip.Prefix {
	caller, ok := peer.FromContext(ctx)
	if !ok {
		return netip.Prefix{}
	}
	return limits.Network(caller.Addr)
}

// callerID is whom a caller counts as: the first name in its certificate, or its address.
func callerID(ctx context.Context) string {
	if names := callerNames(ctx); len(names) > 0 {
		return names[0]
	}
	return callerNetwork(ctx).String()
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
		peers := d.settings().PeerList()
		if len(peers) == 0 {
			return files.Client(address, nil)
		}
		return files.Client(address, func(names []string) error {
			if now := d.settings().PeerList(); len(now) > 0 {
				return now.Allow(names)
			}
			return peers.Allow(names) // without a list the certificate has to be for the host, which is not asked here
		})
	case d.cfg.Plaintext || mtls.Loopback(address):
		return insecure.NewCredentials(), nil
	}
	return nil, fmt.Errorf("no connection without encryption to %s: set tls_certificate, tls_key and tls_ca, or plaintext "+
		"where nobody but hypervisors is on the network", address)
}

// maySend refuses a caller who may not send that VM here.
func (d *Daemon) maySend(ctx context.Context, vm string) error {
	if err := d.settings().PeerList().MaySend(callerNames(ctx), vm); err != nil {
		d.refusals.Refused(limits.VM, callerNetwork(ctx), "error", err)
		return status.Errorf(codes.PermissionDenied, "%v; its entry among the destination's peers says which it may", err)
	}
	return nil
}
