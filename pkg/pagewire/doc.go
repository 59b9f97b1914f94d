// SPDX-License-Identifier: Apache-2.0

// Package pagewire reads and writes the frames of a lane, the messages of PageService.Fetch.
//
// On the wire they are plain Protocol Buffers (proto/migrated/v1/pages.proto), so any gRPC program can
// speak to a daemon. They are read and written by hand here because a generic codec copies page bytes
// twice and allocates for every run of pages. In the way of one page fault this package is the
// envelope around steps 3 and 4:
//
//	destination                                                        source
//	Request{Ranges} ─ encode ─► leased frame ─ lane ─► decode ─► Request{Ranges}
//	                                                                     │ page server reads the pages
//	Reply{Runs,Data} ◄─ decode ◄─ its buffer ◄─ lane ◄─ encode ◄─ Reply.Lease
//
// Page bytes are written once, by the page server, into a leased frame; the header of the message is put in front of
// them and the frame is sent as it is. A lane of package pagelane encodes into Room for its own headers, and reads a
// message into one piece of memory, where Data then lies. For lanes through gRPC's library there is Codec: the receiver
// keeps a reference to gRPC's own buffer when the page bytes lie in one piece there (the 4 KiB page of a fault does),
// and copies them once when they came in several HTTP/2 frames.
//
// # Packed pages
//
// Page bytes may be packed, all of a reply as a whole. The page server decides that for each reply, after
// it has read the pages; the receiver finds them in Reply.Data as if they had come raw:
//
//	source:       Reply.Data, in a leased frame ─ Pack ─► second leased frame ─ lane ─►
//	destination:  its buffer ─ unpack ─► Reply.Data, in memory of the Reply
//
// Only what the destination has announced when it opened the lane is sent (CompressionKey), so raw bytes are all that
// an older one gets. The runs say how long the unpacked bytes are. A message that says otherwise is malformed: see
// unpack.go.
//
// Encoding and decoding, packed or not, allocate nothing once the frames and buffers have been made.
package pagewire

// Limits of one message. A decoder refuses what exceeds them, because peers are not trusted.
const (
	// MaxRanges bounds the ranges of a Request.
	MaxRanges = 256
	// MaxRequestedBytes bounds the sum of the lengths of a Request's ranges: 16 huge pages. It keeps a
	// lane from being busy for long with one message; the page server refuses more.
	MaxRequestedBytes = 32 << 20
	// MaxRuns bounds the runs of a Reply.
	MaxRuns = 256
	// MaxData bounds the page bytes of a Reply: a 2 MiB huge page can only be installed whole.
	MaxData = 2 << 20
	// MaxReplyBytes bounds a whole Reply on the wire.
	MaxReplyBytes = MaxData + headroom
)

// LeastPiece is the smallest Request.Piece, in bytes. Less counts as LeastPiece, because smaller replies cost more than
// they carry.
const LeastPiece = 16 << 10

// Metadata of the call that opens a lane.
const (
	// MigrationIDKey names the migration whose pages are asked for.
	MigrationIDKey = "migration-id"
	// MigrationTokenKey carries the secret that the source gave to the destination of the migration.
	MigrationTokenKey = "migration-token"
	// ProtocolKey is the version of the protocol that the migration keeps to, in decimal. Its absence says 1.
	ProtocolKey = "migrated-protocol"
	// LaneKey tells a lane's kind. The only value is BulkLane; a demand lane does not have the key.
	LaneKey = "migrated-lane"
	// BulkLane is the value of LaneKey for a lane of the sweep.
	BulkLane = "bulk"
	// LostKey says, with the value CanLose, that the caller accepts runs that are lost.
	LostKey = "migrated-lost"
	// CanLose is the value of LostKey.
	CanLose = "1"
)
