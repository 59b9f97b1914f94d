// SPDX-License-Identifier: Apache-2.0

package pagesrv

import (
	"time"

	"github.com/migrated-vm/migrated/pkg/pagewire"
)

// Does packing pay? A byte of a page that is sent raw costs what the link takes for it. A packed byte costs the
// packing, the unpacking, and what the link takes for the part that is left of it:
//
//	pack + unpack + ratio × link < link        all in ns per byte of the page
//
// A judge decides by the replies before, because the next data is unknown. It packs as long as that pays, and rests
// (sends replies raw) when it did not. After a rest it tries a sample first, and rests twice as long if that does not
// pay.

const (
	// unpackS2 and unpackZstd are the time of unpacking as a part of the time of packing: measured
	// (pagewire's BenchmarkReply) it is 0.2 to 0.8 for S2 and 0.1 to 0.3 for Zstd, more for what packs well.
	unpackS2, unpackZstd = 0.8, 0.3

	// Packed data may have at most worthwhileNum / worthwhileDen of its size: saving less is not worth the second buffer
	// and the unpacking.
	worthwhileNum, worthwhileDen = 7, 8

	// longestRest is the most replies that are sent raw before the next sample. For memory that does not pack, or not fast
	// enough, the samples then cost less than a percent of sending it. When the sweep comes to memory that does pack, it
	// notices within 8 MiB.
	longestRest = 16
	// longestPageRest is the same for replies that are too small for a sample. The replies to a few faults are packed
	// whole to find out, which takes a third of the time that sending them does.
	longestPageRest = 64

	// bulkReply is the smallest size, in bytes, of a reply of the bulk lane for which Zstd may be taken. Below
	// it, Zstd's tables cost more than its better packing gains.
	bulkReply = 32 << 10

	// otherTurn is how often the method that seems worse is tried, in replies, because what is known of it is old.
	otherTurn = 32

	// learning is the weight of the newest reply in what is known of a method.
	learning = 1.0 / 8
)

// A method is what one lane knows of one compression.
type method struct {
	pack   float64 // ns per byte of a page
	unpack float64 // the same for the receiver, as a part of pack
	ratio  float64 // packed size to size
}

// learn takes the packing of size bytes into account. A disturbance only ever makes a measured time longer. So a
// shorter time is believed at once, and a longer one by and by: an interruption changes pack by three eighths.
func (m *method) learn(size, packed int, took time.Duration) {
	pack := float64(took) / float64(size)
	if pack > m.pack {
		pack = m.pack + (min(pack, 4*m.pack)-m.pack)*learning
	}
	m.pack = pack
	m.ratio += (float64(packed)/float64(size) - m.ratio) * learning
}

// cost is what packing and unpacking take, in ns per byte of a page.
func (m *method) cost() float64 { return m.pack * (1 + m.unpack) }

// saves is what the method gains on a link of so many ns per byte, in ns per byte of a page.
func (m *method) saves(link float64) float64 { return link*(1-m.ratio) - m.cost() }

// A judge decides for each reply of a lane how it is packed.
type judge struct {
	announced pagewire.Compressions // by the peer
	bulk      bool                  // the lane is the bulk lane
	s2, zstd  method
	rest      int  // how many replies a rest has; 0: not resting
	resting   int  // how many of them are still to come
	turn      uint // of bulk replies packed
}

// newJudge makes a judge that requires a sample first, and has typical figures of each method.
func newJudge(announced pagewire.Compressions, bulk bool) judge {
	return judge{
		announced: announced, bulk: bulk,
		s2:   method{pack: 0.5, unpack: unpackS2, ratio: 0.5},
		zstd: method{pack: 3, unpack: unpackZstd, ratio: 0.4},
		rest: 1,
	}
}

// sleeps reports whether to send the next reply raw, and counts the rest down.
func (j *judge) sleeps() bool {
	if j.announced == 0 {
		return true
	}
	if j.resting > 0 {
		j.resting--
		return true
	}
	return false
}

// doubts reports whether a sample must pay before the next reply is packed.
func (j *judge) doubts() bool { return j.rest > 0 }

// choose returns the best method for a reply of size bytes.
func (j *judge) choose(size int, link float64) pagewire.Compression {
	bulk := j.bulk && size >= bulkReply && j.announced.Has(pagewire.Zstd)
	if !j.announced.Has(pagewire.S2) {
		if bulk {
			return pagewire.Zstd
		}
		return pagewire.None
	}
	if !bulk {
		return pagewire.S2
	}
	zstd := j.zstd.saves(link) > j.s2.saves(link)
	if j.turn++; j.turn%otherTurn == 0 && j.zstd.cost() < link { // Zstd is not tried where it cannot pay
		zstd = !zstd
	}
	if zstd {
		return pagewire.Zstd
	}
	return pagewire.S2
}

// paid records the packing of a reply, or of a sample with S2, and reports whether it paid.
func (j *judge) paid(c pagewire.Compression, size, packed int, took time.Duration, link float64) bool {
	known := &j.s2
	if c == pagewire.Zstd {
		known = &j.zstd
	}
	known.learn(size, packed, took)
	this := method{pack: known.pack, unpack: known.unpack, ratio: float64(packed) / float64(size)}
	if packed > worthwhile(size) || this.saves(link) <= 0 {
		longest := longestRest
		if size < 2*samplePiece {
			longest = longestPageRest
		}
		j.rest = min(max(1, 2*j.rest), longest)
		j.resting = j.rest
		return false
	}
	j.rest = 0
	return true
}

// worthwhile is the size, in bytes, up to which the packed form of size bytes is sent.
func worthwhile(size int) int { return size / worthwhileDen * worthwhileNum }
