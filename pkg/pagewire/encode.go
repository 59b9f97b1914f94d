// SPDX-License-Identifier: Apache-2.0

package pagewire

import (
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"
)

// Field numbers of pages.proto. FetchRequest.ranges and FetchResponse.runs are both number 1, and
// PageRange has the first three fields of PageRun.
const (
	fieldRanges, fieldRuns = 1, 1
	fieldData, fieldHoles  = 2, 2
	fieldCompression       = 3 // of a response
	fieldPiece             = 3 // of a request

	fieldBlock  = 1
	fieldOffset = 2
	fieldLength = 3
	fieldZero   = 4
	fieldLost   = 5
	fieldHole   = 6
)

// Room is how many bytes are free in front of an encoded message, for the header of an HTTP/2 frame and gRPC's prefix.
const Room = 9 + 5

// Encoded is an encoded message in leased memory, for a sender other than gRPC's library. Release it when it is sent.
type Encoded struct {
	// Bytes are Room bytes for the headers of the sender, and the message.
	Bytes []byte
	frame *frame
}

// Release ends the use of Bytes, whose memory is used for another message then.
func (e Encoded) Release() { e.frame.recycle() }

// Encode encodes the request. The error says that it has more than MaxRanges ranges.
func (r *Request) Encode() (Encoded, error) { return encodeRequest(r) }

// Encode encodes the reply, and takes Data away, except when it fails. The error says that the reply exceeds a limit,
// or that Data is not as long as its runs say.
func (r *Reply) Encode() (Encoded, error) { return encodeReply(r) }

func encodeRequest(r *Request) (Encoded, error) {
	if len(r.Ranges) > MaxRanges {
		return Encoded{}, fmt.Errorf("pagewire: request of %d ranges, at most %d fit", len(r.Ranges), MaxRanges)
	}
	f := leaseFrame(headroom)
	out := f.memory[:Room]
	for i := range r.Ranges {
		g := &r.Ranges[i]
		out = appendRun(out, Run{Block: g.Block, Offset: g.Offset, Length: g.Length})
	}
	if r.Holes {
		out = appendNumber(out, fieldHoles, 1)
	}
	if r.Piece > 0 {
		out = appendNumber(out, fieldPiece, uint64(r.Piece))
	}
	return Encoded{out, f}, nil
}

func encodeReply(r *Reply) (Encoded, error) {
	size, err := headerSize(r)
	if err != nil {
		return Encoded{}, err
	}
	data, compression := r.Carried(), r.compression
	var f *frame
	switch {
	case r.packed != nil:
		f, r.packed = r.packed, nil
		r.Release()
	case r.leased():
		f = r.lease
		r.lease, r.Data = nil, nil
	default:
		f = leaseFrame(headroom + data)
		copy(f.memory[headroom:], r.Data)
	}
	start := headroom - size
	out := f.memory[start:start]
	for i := range r.Runs {
		out = appendRun(out, r.Runs[i])
	}
	out = appendNumber(out, fieldCompression, uint64(compression))
	if data > 0 {
		out = protowire.AppendTag(out, fieldData, protowire.BytesType)
		protowire.AppendVarint(out, uint64(data))
	}
	return Encoded{f.memory[start-Room : headroom+data], f}, nil
}

// headerSize checks the reply and returns the bytes before its page bytes.
func headerSize(r *Reply) (int, error) {
	if len(r.Runs) > MaxRuns || len(r.Data) > MaxData {
		return 0, fmt.Errorf("pagewire: reply of %d runs and %d bytes, at most %d and %d fit",
			len(r.Runs), len(r.Data), MaxRuns, MaxData)
	}
	size, carried := 0, uint64(0)
	for i := range r.Runs {
		size += 2 + runSize(r.Runs[i]) // tag and length take a byte each
		if r.Runs[i].Carries() {
			carried += uint64(r.Runs[i].Length)
		}
	}
	if carried != uint64(len(r.Data)) {
		return 0, fmt.Errorf("pagewire: reply with %d bytes for runs of %d", len(r.Data), carried)
	}
	if r.compression != None {
		size += compressionSize
	}
	if data := r.Carried(); data > 0 {
		size += 1 + protowire.SizeVarint(uint64(data))
	}
	return size, nil
}

// compressionSize is the size of the compression field: its tag, a small number.
const compressionSize = 2

// maxRunSize is what runSize gives at most: tags, two 32-bit and one 64-bit number, a flag: a run has one at most.
const maxRunSize = 4 + 5 + 10 + 5 + 1

// The header of the largest reply must fit before the page bytes, the largest request into headroom.
const (
	_ = uint(headroom - (Room + MaxRuns*(2+maxRunSize) + compressionSize + 1 + 5))
	_ = uint(headroom - (Room + MaxRanges*(2+maxRunSize) + 2 + 1 + 5))
)

// runSize is the size of a PageRun message. Fields that are zero are left out, as proto3 does.
func runSize(r Run) int {
	size := 0
	if r.Block != 0 {
		size += 1 + protowire.SizeVarint(uint64(r.Block))
	}
	if r.Offset != 0 {
		size += 1 + protowire.SizeVarint(r.Offset)
	}
	if r.Length != 0 {
		size += 1 + protowire.SizeVarint(uint64(r.Length))
	}
	if !r.Carries() {
		size += 2
	}
	return size
}

// appendRun appends a run as field 1 of the message around it; without Zero it is a PageRange too.
func appendRun(out []byte, r Run) []byte {
	out = protowire.AppendTag(out, fieldRuns, protowire.BytesType)
	out = protowire.AppendVarint(out, uint64(runSize(r)))
	out = appendNumber(out, fieldBlock, uint64(r.Block))
	out = appendNumber(out, fieldOffset, r.Offset)
	out = appendNumber(out, fieldLength, uint64(r.Length))
	switch {
	case r.Lost: // whatever else it is
		out = appendNumber(out, fieldLost, 1)
	case r.Hole:
		out = appendNumber(out, fieldHole, 1)
	case r.Zero:
		out = appendNumber(out, fieldZero, 1)
	}
	return out
}

func appendNumber(out []byte, field protowire.Number, v uint64) []byte {
	if v == 0 {
		return out
	}
	return protowire.AppendVarint(protowire.AppendTag(out, field, protowire.VarintType), v)
}
