// SPDX-License-Identifier: Apache-2.0

package pagewire

import (
	"fmt"

	"github.com/klauspost/compress/zstd"
	"google.golang.org/grpc/mem"
)

// Range asks for whole pages of one RAM block.
type Range struct {
	Block  uint32 // index in the list agreed on by PrepareIncoming
	Offset uint64 // bytes from the beginning of the block
	Length uint32 // bytes
}

// Run answers for whole pages of one RAM block.
type Run struct {
	Block  uint32 // as in Range
	Offset uint64 // bytes from the beginning of the block
	Length uint32 // bytes
	// Zero says that all bytes of the run are zero and none are in the reply's data.
	Zero bool
	// Lost says that the source cannot read the pages, so that nobody knows any more what they held. None of their bytes
	// are in the reply's data.
	Lost bool
	// Hole says that all bytes of the run are zero, and that the run was not asked for (Request.Holes). None are in the
	// reply's data.
	Hole bool
}

// Carries says whether the reply's data has the bytes of the run.
func (r Run) Carries() bool { return !r.Zero && !r.Lost && !r.Hole }

// Request is the FetchRequest of a lane. Receiving into the same Request again reuses its Ranges.
type Request struct {
	// Ranges are the pages that are asked for, at most MaxRanges ranges and MaxRequestedBytes bytes.
	Ranges []Range
	// Holes says that the reply may also have runs of holes that were not asked for (Run.Hole).
	Holes bool
	// Piece is how many bytes of pages one reply is to carry at most, unless one page is larger. Less than LeastPiece
	// counts as LeastPiece, except for 0, with which the source decides.
	Piece uint32
}

// Reply is the FetchResponse of a lane. One goroutine at a time may use it.
//
// To receive: pass it to Recv of a lane. Data then is unpacked, in memory of the lane or of the Reply, to be read only.
// It is valid until the next Recv or Release.
//
// To send: set Runs, fill Data from its beginning after Lease, reslice Data if less was needed, Pack it or not, pass
// the Reply to Send of a lane. Send takes Data away; Runs may be reused at once. Data that was not leased and is not
// packed is copied and stays the caller's.
type Reply struct {
	// Runs are the pages that the reply answers for, at most MaxRuns runs.
	Runs []Run
	// Data holds the bytes of the runs that are not zero, in the order of Runs.
	Data []byte

	// How Data is, or was, on the wire.
	compression Compression
	packedSize  int // bytes; 0 unless packed

	lease   *frame        // sending: where Data lies
	packed  *frame        // sending: where its packed form lies
	zstdOut *zstd.Encoder // sending: made when it is needed

	held   mem.Buffer    // receiving: the reference that keeps Data valid
	own    []byte        // receiving: reused for data that was packed or came in pieces
	pieces []byte        // receiving: reused for packed data that came in pieces
	zstdIn *zstd.Decoder // receiving: made when it is needed
}

// Carried returns how many bytes of data the message has on the wire: as many as Data, or fewer. It is
// valid as long as Data is, and 0 without Data.
func (r *Reply) Carried() int {
	if r.compression == None {
		return len(r.Data)
	}
	return r.packedSize
}

// Compression returns how Data is packed on the wire. It is valid as long as Data is.
func (r *Reply) Compression() Compression { return r.compression }

// Lease gives the reply Data of n bytes, at most MaxData (more panics). Its content is undefined: fill what is sent.
func (r *Reply) Lease(n int) {
	if n < 0 || n > MaxData {
		panic(fmt.Sprintf("pagewire: lease of %d bytes, a reply carries at most %d", n, MaxData))
	}
	r.Release()
	r.lease = leaseFrame(headroom + n)
	r.Data = r.lease.memory[headroom : headroom+n]
}

// Release ends the use of Data, whose memory is used for another reply then. It may be called at any time.
func (r *Reply) Release() {
	r.Data = nil
	r.dropPacked()
	if r.lease != nil {
		r.lease.recycle()
		r.lease = nil
	}
	if r.held != nil {
		r.held.Free()
		r.held = nil
	}
}

// leased says whether Data still begins where Lease put it.
func (r *Reply) leased() bool {
	return r.lease != nil && (len(r.Data) == 0 || &r.Data[0] == &r.lease.memory[headroom])
}
