// SPDX-License-Identifier: Apache-2.0

package pagesrv

import "github.com/migrated-vm/migrated/pkg/pagewire"

// A VM may have far more memory than it uses. The sweep would request all of it, 512 KiB at a time, to learn that
// nearly all is zero. So a reply may report holes that the request did not ask for (Request.Holes): the hole in which
// it ends, and the next ones behind it.
//
//	request:     [    ]
//	memory:      ..data........................data.............datadatadatadatadatadatadatadatadata....
//	told of:           [ hole                 ]    [ hole       ]
//	looked at:                                   ^              ^   ^   ^       ^ no hole: the next request goes on here
//
// A hole is memory of which the kernel says that it has no page: by SEEK_DATA for a file, by PAGEMAP_SCAN for private
// memory (ram.go). The VM is stopped (Export.confirm), so a hole stays a hole. Pages that were written with zeros are
// not holes: they are read when they are asked for.
//
// SEEK_HOLE is not used: the kernel would walk through all data up to the next hole, at once. Instead, after a hole was
// found, the next one is looked for 1, 2, 4, … pages behind the place where data begins. A missed hole does no harm:
// its pages are asked for. Memory without holes costs one search for each request. Searches count as pages that were
// asked for (quota.go).
const (
	// holeRun is the longest run that reports a hole, in bytes: the length of a run has 32 bits.
	holeRun = 2 << 30
	// holeRuns is how many such runs a reply has at most. If all have the full length, they take the destination some ms.
	holeRuns = 16
	// farthestProbe is how far behind the beginning of data a hole is looked for, in pages.
	farthestProbe = 64
	// scouts is how many places a lane remembers in scouted: as many as the sweep has fronts.
	scouts = 4
)

// scouted is a part of a block. The peer was told of all holes that were found in it.
type scouted struct {
	block     uint32
	from, end uint64
	near      bool // a hole ends at end
	stuck     bool // no hole was found behind end
}

// scoutedAt returns the part that the answered range r continues, or begins a new one.
func (l *lane) scoutedAt(r pagewire.Range) *scouted {
	end := r.Offset + uint64(r.Length)
	for i := range l.scouted {
		s := &l.scouted[i]
		if s.block != r.Block || s.end == 0 || r.Offset > s.end || end < s.from {
			continue
		}
		s.from = min(s.from, r.Offset)
		if end > s.end {
			s.end, s.near, s.stuck = end, false, false
		}
		return s
	}
	l.scout = (l.scout + 1) % scouts
	l.scouted[l.scout] = scouted{block: r.Block, from: r.Offset, end: end}
	return &l.scouted[l.scout]
}

// tellHoles adds holes to the reply that answers the end of the request.
func (l *lane) tellHoles() error {
	if !l.request.Holes || len(l.reply.Runs) == 0 {
		return nil
	}
	s := l.scoutedAt(l.request.Ranges[len(l.request.Ranges)-1])
	b := &l.export.ram.blocks[s.block]
	for range min(holeRuns, pagewire.MaxRuns-len(l.reply.Runs)) {
		if s.end == b.Size || s.stuck {
			return nil
		}
		hole, data, err := l.nextHole(b, s.block, s.end, s.near)
		if err != nil {
			return err
		}
		if hole == data {
			s.stuck = true
			return nil
		}
		data = min(data, hole+holeRun)
		l.reply.Runs = append(l.reply.Runs, pagewire.Run{
			Block: s.block, Offset: hole, Length: uint32(data - hole), Hole: true,
		})
		l.counters.holePages.Add((data - hole) / b.PageSize)
		s.end, s.near = data, true
	}
	return nil
}

// nextHole looks for a hole at the place at or, where holes are near, a little behind it. It returns where the hole
// begins and ends; the hole is empty if none was found.
func (l *lane) nextHole(b *openBlock, block uint32, at uint64, near bool) (hole, data uint64, err error) {
	if block == l.holeBlock && at >= l.holeStart && at < l.holeEnd {
		return at, l.holeEnd, nil
	}
	for step := uint64(0); step <= farthestProbe && at+step*b.PageSize < b.Size; step = max(1, 2*step) {
		hole = at + step*b.PageSize
		l.searched += leastAsked
		if data, err = l.seekData(block, hole); data > hole || err != nil || !near {
			return hole, data, err
		}
	}
	return at, at, nil
}
