// SPDX-License-Identifier: Apache-2.0

package pagewire

import (
	"strconv"

	"google.golang.org/grpc/metadata"
)

// Call is what a destination says of a lane when it opens it.
type Call struct {
	ID    string // of the migration whose pages are asked for
	Token string // the secret that the source gave to the destination of the migration
	// Protocol is the version of the protocol that the migration keeps to. 0 is not sent, and means 1.
	Protocol uint32
	Bulk     bool // it is the sweep's lane, for pages that no thread waits for
	Packed   bool // pages may come packed, in any way that this package unpacks
	CanLose  bool // the caller deals with runs that are lost
}

// Metadata returns the metadata with which gRPC carries c.
func (c Call) Metadata() metadata.MD {
	md := metadata.Pairs(MigrationIDKey, c.ID, MigrationTokenKey, c.Token)
	if c.Protocol != 0 {
		md.Set(ProtocolKey, strconv.FormatUint(uint64(c.Protocol), 10))
	}
	if c.Bulk {
		md.Set(LaneKey, BulkLane)
	}
	if c.Packed {
		md.Set(CompressionKey, Unpackable)
	}
	if c.CanLose {
		md.Set(LostKey, CanLose)
	}
	return md
}
