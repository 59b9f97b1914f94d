// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"crypto/subtle"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/migrated-vm/migrated/internal/pagewire"
)

// A Dialer connects to another daemon at HOST:PORT.
type Dialer func(address string, options ...grpc.DialOption) (*grpc.ClientConn, error)

// withToken makes every call of a connection say which migration it is about
// and prove that the caller takes part in it. The source makes the token and
// tells it to the destination alone.
func withToken(id, token string) grpc.DialOption {
	return grpc.WithPerRPCCredentials(callToken{pagewire.MigrationIDKey: id, pagewire.MigrationTokenKey: token})
}

type callToken map[string]string

func (t callToken) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return t, nil
}

// RequireTransportSecurity is false because daemons listen on loopback or a
// trusted network until they are given certificates.
func (callToken) RequireTransportSecurity() bool { return false }

// Authentic says whether the call ctx belongs to comes from the source of this
// migration.
func (d *Destination) Authentic(ctx context.Context) bool {
	shown := metadata.ValueFromIncomingContext(ctx, pagewire.MigrationTokenKey)
	return len(shown) == 1 && subtle.ConstantTimeCompare([]byte(shown[0]), []byte(d.cfg.Request.GetToken())) == 1
}
