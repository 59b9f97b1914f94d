// SPDX-License-Identifier: Apache-2.0

package pagewire

import (
	"fmt"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
)

// The peer may be hostile: a few bytes can claim to be gigabytes. The runs say how long the unpacked bytes must be;
// that is checked against MaxData first. Data that claims another length is not unpacked, and nothing is unpacked
// beyond a buffer of that length.

// unpack unpacks the data field, the rest of the message, by r.compression. n is its size and raw the size of the
// unpacked bytes.
func (c *cursor) unpack(n int, raw uint64, r *Reply) error {
	switch {
	case raw > MaxData:
		return malformed("packed data for runs of %d bytes, at most %d are possible", raw, MaxData)
	case raw == 0 || n == 0:
		return malformed("packed data of %d bytes for runs of %d", n, raw)
	}
	packed := c.whole(n, r)
	if uint64(cap(r.own)) < raw {
		r.own = make([]byte, raw)
	}
	room := r.own[:0:raw]
	var out []byte
	var err error
	switch r.compression {
	case S2:
		var claimed int
		if claimed, err = s2.DecodedLen(packed); err == nil && uint64(claimed) != raw {
			return malformed("packed data of %d bytes for runs of %d", claimed, raw)
		}
		if err == nil {
			out, err = s2.Decode(room, packed)
		}
	case Zstd:
		out, err = r.zstdUnpacker().DecodeAll(packed, room)
	default:
		return malformed("data packed with %v", r.compression)
	}
	if err != nil {
		return malformed("data packed with %v: %v", r.compression, err)
	}
	if uint64(len(out)) != raw {
		return malformed("packed data of %d bytes for runs of %d", len(out), raw)
	}
	r.Data, r.packedSize = out, n
	return nil
}

// whole returns what is left, n bytes, in one piece: a gRPC buffer's memory, or a copy.
func (c *cursor) whole(n int, r *Reply) []byte {
	c.turn()
	if len(c.piece) == n {
		return c.piece
	}
	if cap(r.pieces) < n {
		r.pieces = make([]byte, n)
	}
	packed := r.pieces[:n]
	c.copyTo(packed)
	return packed
}

func (r *Reply) zstdUnpacker() *zstd.Decoder {
	if r.zstdIn == nil {
		// A cap limit: never more than the room that it is given. Concurrency 1: no goroutine.
		in, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxMemory(MaxData), zstd.WithDecodeAllCapLimit(true))
		if err != nil {
			panic(fmt.Sprintf("pagewire: options of zstd: %v", err)) // they are constant
		}
		r.zstdIn = in
	}
	return r.zstdIn
}
