// SPDX-License-Identifier: Apache-2.0

package pagewire

import (
	"fmt"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
)

// packSlack is how much larger every frame is than its nominal size: bytes that do not compress grow a little when
// packed, and the packers allocate where they might not fit.
const packSlack = 512

// zstdWindow is how far back, in bytes, the Zstd packer looks for repetitions: a run of the sweep. With it, the
// packer holds 1.5 MiB.
const zstdWindow = 512 << 10

// Pack packs Data, which is not empty, and returns the packed size in bytes. If that is not more than most, Send sends
// the packed form, else the reply stays as it was. Data stays readable until Send; to change it or its length after
// Pack, begin again with Lease.
//
// The first Pack with Zstd makes a packer, which stays with the reply.
func (r *Reply) Pack(c Compression, most int) (size int) {
	f := leaseFrame(headroom + len(r.Data) + packSlack)
	room := f.memory[headroom:]
	var out []byte
	switch c {
	case S2:
		out = s2.Encode(room, r.Data)
	case Zstd:
		out = r.zstdPacker().EncodeAll(r.Data, room[:0])
	default:
		panic(fmt.Sprintf("pagewire: pack with %v", c))
	}
	if len(out) > most || &out[0] != &room[0] { // the latter: it did not fit, so the packer allocated
		f.recycle()
		return len(out)
	}
	r.dropPacked()
	r.packed, r.packedSize, r.compression = f, len(out), c
	return len(out)
}

func (r *Reply) zstdPacker() *zstd.Encoder {
	if r.zstdOut == nil {
		// No checksum: TCP and TLS have theirs. Concurrency 1: no goroutine.
		out, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1),
			zstd.WithEncoderCRC(false), zstd.WithWindowSize(zstdWindow))
		if err != nil {
			panic(fmt.Sprintf("pagewire: options of zstd: %v", err)) // they are constant
		}
		r.zstdOut = out
	}
	return r.zstdOut
}

// dropPacked forgets how Data was packed.
func (r *Reply) dropPacked() {
	if r.packed != nil {
		r.packed.recycle()
		r.packed = nil
	}
	r.packedSize, r.compression = 0, None
}
