// SPDX-License-Identifier: Apache-2.0

package limits

import (
	"context"
	"net/netip"
	"slices"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// Calls refuses calls of these methods ("/package.Service/Method") that come too fast from one address.
func (p *Peers) Calls(methods ...string) grpc.ServerOption {
	return grpc.ChainUnaryInterceptor(func(
		ctx context.Context, request any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler,
	) (any, error) {
		if !slices.Contains(methods, info.FullMethod) {
			return handle(ctx, request)
		}
		var address netip.Prefix // the zero value: the caller has no address
		if caller, ok := peer.FromContext(ctx); ok {
			address = Network(caller.Addr)
		}
		if !p.mayCall(address) {
			p.refusals.Refused(Calling, address)
			return nil, status.Errorf(codes.ResourceExhausted,
				"%s is called too often from %s: at most %d times a second; try again later",
				info.FullMethod, address.Addr(), callRate)
		}
		return handle(ctx, request)
	})
}
