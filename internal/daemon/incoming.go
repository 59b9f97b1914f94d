// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/internal/migration"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// GetIncoming asks the side with the role of the request. A source asks its destination.
func (c *controlService) GetIncoming(
	ctx context.Context, request *migratedv1.GetIncomingRequest,
) (*migratedv1.GetIncomingResponse, error) {
	var incoming *migratedv1.Incoming
	var err error
	code := codes.FailedPrecondition
	switch t := c.daemon.migrations.findAs(request.GetId(), request.GetRole()).(type) {
	case *migration.Source:
		incoming, err = t.Incoming(ctx, request.GetCells())
		if status.Code(err) != codes.Unknown { // the destination or the network returned it
			code = codes.Unavailable
		}
	case *migration.Destination:
		incoming, err = t.Incoming(request.GetCells())
	case nil:
		return nil, notFound(request.GetId())
	default: // a Leftover
		return nil, status.Errorf(codes.FailedPrecondition,
			"an earlier run of this daemon left migration %s, and this one cannot read it", request.GetId())
	}
	if err != nil {
		return nil, migration.ToStatus(code, err)
	}
	return &migratedv1.GetIncomingResponse{Incoming: incoming}, nil
}

func (p *peerService) ShowIncoming(
	ctx context.Context, request *migratedv1.ShowIncomingRequest,
) (*migratedv1.ShowIncomingResponse, error) {
	d, err := p.destination(ctx, request.GetId())
	if err != nil {
		return nil, err
	}
	incoming, err := d.Incoming(request.GetCells())
	if err != nil {
		return nil, migration.ToStatus(codes.FailedPrecondition, err)
	}
	return &migratedv1.ShowIncomingResponse{Incoming: incoming}, nil
}
