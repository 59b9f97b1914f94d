// SPDX-License-Identifier: Apache-2.0

package pagesrv

import (
	"time"

	"github.com/klauspost/compress/s2"

	"github.com/migrated-vm/migrated/pkg/pagewire"
)

// samplePiece is the size of half a sample, in bytes; the whole is 3 % of a run of the sweep.
const samplePiece = 8 << 10

// A packer packs the replies of one lane, where that pays.
type packer struct {
	judge
	link    *link
	place   int                       // of the next sample in its pitch, in pieces
	scratch [samplePiece + 1<<10]byte // for packed samples, with the room that S2 wants
}

func newPacker(announced pagewire.Compressions, bulk bool, link *link) packer {
	return packer{judge: newJudge(announced, bulk), link: link}
}

// pack packs the reply, whose Data is complete, or leaves it as it is.
func (p *packer) pack(r *pagewire.Reply) {
	size := len(r.Data)
	if size == 0 || p.sleeps() {
		return
	}
	link := p.link.cost()
	if p.doubts() && size >= 2*samplePiece && !p.sample(r.Data, link) {
		return
	}
	c := p.choose(size, link)
	if c == pagewire.None {
		return
	}
	began := time.Now()
	packed := r.Pack(c, worthwhile(size))
	p.paid(c, size, packed, time.Since(began), link)
}

// sample says whether packing a piece of data paid. Each time the piece is from another place, because the beginning of
// a huge page, for example, may hold other data than its middle.
//
// Only its second half is timed. For the first half the code and tables of the packing must first come into the
// processor's caches. That takes longer than packing a sample, but hardly counts for a whole reply.
func (p *packer) sample(data []byte, link float64) bool {
	at := p.place % (len(data) / (2 * samplePiece)) * 2 * samplePiece
	p.place++
	packed := len(s2.Encode(p.scratch[:], data[at:at+samplePiece]))
	began := time.Now()
	packed += len(s2.Encode(p.scratch[:], data[at+samplePiece:at+2*samplePiece]))
	took := time.Since(began)
	return p.paid(pagewire.S2, 2*samplePiece, packed, 2*took, link)
}
