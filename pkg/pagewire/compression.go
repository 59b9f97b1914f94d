// SPDX-License-Identifier: Apache-2.0

package pagewire

import "strings"

// Compression says how the page bytes of a Reply are packed on the wire.
type Compression uint8

// The numbers of enum Compression of pages.proto.
const (
	None Compression = iota // None says that the bytes are as they are.
	S2                      // S2 is an extension of Snappy, and fast.
	Zstd                    // Zstd makes them smaller than S2 does, and takes several times as long.

	compressions // how many there are
)

// String returns the name under which a receiver announces the compression.
func (c Compression) String() string {
	switch c {
	case None:
		return "none"
	case S2:
		return "s2"
	case Zstd:
		return "zstd"
	default:
		return "unknown compression"
	}
}

const (
	// CompressionKey is metadata of the call that opens a lane: what its caller can unpack. Without it,
	// page bytes come as they are.
	CompressionKey = "migrated-compression"
	// Unpackable is the value with which a receiver that uses this package announces all it can unpack.
	Unpackable = "s2,zstd"
)

// Compressions is a set of compressions that a receiver can unpack. None is in every set.
type Compressions uint8

// Has says whether c is in the set.
func (s Compressions) Has(c Compression) bool { return c == None || s&(1<<c) != 0 }

// Announced returns the compressions that the values of CompressionKey name. Names that are not known, of a newer peer,
// are passed over.
func Announced(values []string) (s Compressions) {
	for _, value := range values {
		for name := range strings.SplitSeq(value, ",") {
			for c := S2; c < compressions; c++ {
				if strings.TrimSpace(name) == c.String() {
					s |= 1 << c
				}
			}
		}
	}
	return s
}
