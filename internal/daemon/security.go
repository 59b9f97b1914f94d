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

	"github.com/migrated-vm/migrated/internal/limits"
	"github.com/migrated-vm/migrated/pkg/mtls"
	"github.com/migrated-vm/migrated/pkg/pagelane/tcpkeepalive"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// network has what a server for other hosts needs: a listener within the limits of package limits, mutual TLS if it is
// set, and a check of callers.
type network struct {
	net.Listener // accepts connections within the limits

	creds   credentials.TransportCredentials
	refuse  func(context.Context) error // returns an error for a caller who must not call
	options []grpc.ServerOption         // without creds
}

// network makes a network of a listener, for callers that allow accepts. Others are refused with a status in the answer
// to their call: a TLS alert during the handshake would look like a broken connection to them.
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
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{
			MinTime: tcpkeepalive.Quiet / 2, PermitWithoutStream: true,
		}),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			Time: tcpkeepalive.Quiet, Timeout: tcpkeepalive.Answer, MaxConnectionIdle: limits.IdleTime,
		}),
		peers.Calls(migratedv1.PeerService_PrepareIncoming_FullMethodName, migratedv1.PeerService_CheckHost_FullMethodName),
		grpc.ChainUnaryInterceptor(func(
			ctx context.Context, request any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler,
		) (any, error) {
			if err := n.refuse(ctx); err != nil {
				return nil, err
			}
			return handle(ctx, request)
		}),
		grpc.ChainStreamInterceptor(func(
			server any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handle grpc.StreamHandler,
		) error {
			if err := n.refuse(stream.Context()); err != nil {
				return err
			}
			return handle(server, stream)
		}),
	}
	return n
}

// callerNetwork returns the prefix that the caller's address is counted by.
func callerNetwork(ctx context.Context) netip.Prefix {
	caller, ok := peer.FromContext(ctx)
	if !ok {
		return netip.Prefix{}
	}
	return limits.Network(caller.Addr)
}

// callerID identifies a caller: by the first name in its certificate, or by its address.
func callerID(ctx context.Context) string {
	if names := callerNames(ctx); len(names) > 0 {
		return names[0]
	}
	return callerNetwork(ctx).String()
}

// callerNames returns the names in the caller's certificate.
func callerNames(ctx context.Context) []string {
	caller, ok := peer.FromContext(ctx)
	if !ok {
		return nil
	}
	return mtls.Names(caller.AuthInfo)
}

// dialCredentials returns the credentials for a connection to another daemon.
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
			return peers.Allow(names) // the list is empty now, but this connection does not verify the host name
		})
	case d.cfg.Plaintext || mtls.Loopback(address):
		return insecure.NewCredentials(), nil
	}
	return nil, fmt.Errorf("refusing an unencrypted connection to %s: set tls_certificate, tls_key and tls_ca, "+
		"or plaintext where nobody but hypervisors is on the network", address)
}

// maySend refuses a caller that may not send that VM here.
func (d *Daemon) maySend(ctx context.Context, vm string) error {
	if err := d.settings().PeerList().MaySend(callerNames(ctx), vm); err != nil {
		d.refusals.Refused(limits.VM, callerNetwork(ctx), "error", err)
		return status.Errorf(codes.PermissionDenied, "%v; its entry among the destination's peers says which it may", err)
	}
	return nil
}
