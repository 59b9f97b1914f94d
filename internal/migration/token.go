// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"crypto/subtle"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/migrated-vm/migrated/pkg/pagewire"
)

// A Dialer connects to another daemon at HOST:PORT.
type Dialer func(address string, options ...grpc.DialOption) (*grpc.ClientConn, error)

// withToken adds the migration's id and its token to every call of a connection. The token proves that the caller
// takes part in the migration: the source makes it and tells only the destination.
func withToken(id, token string) grpc.DialOption {
	return grpc.WithPerRPCCredentials(callToken{pagewire.MigrationIDKey: id, pagewire.MigrationTokenKey: token})
}

type callToken map[string]string

func (t callToken) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return t, nil
}

// RequireTransportSecurity returns false: without certificates, daemons listen on loopback or a trusted network.
func (callToken) RequireTransportSecurity() bool { return false }

// Authentic says whether the call with context ctx comes from the source of this migration.
func (d *Destination) Authentic(ctx context.Context) bool {
	shown := metadata.ValueFromIncomingContext(ctx, pagewire.MigrationTokenKey)
	return len(shown) == 1 && subtle.ConstantTimeCompare([]byte(shown[0]), []byte(d.cfg.Request.GetToken())) == 1
}
