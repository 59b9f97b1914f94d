// SPDX-License-Identifier: Apache-2.0

package pagesrv

import (
	"context"
	"errors"
	"io"
	"math"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/migrated-vm/migrated/pkg/pagewire"
)

const (
	// replyData is how many page bytes a reply carries at most, unless one page is larger: what the
	// sweep asks for at a time, and what one UFFDIO_COPY installs.
	replyData = 512 << 10
	// pieceTime is how long the network is to take for the first reply to a request of a demand lane. That reply has
	// pagewire.LeastPiece page bytes at least. A page is installed when its reply is there, and the first page must not
	// wait for the last. Each further reply has twice as many bytes, so that many pages do not cost as many messages. On a
	// bulk lane a request says how many bytes each reply is to have (Request.Piece).
	pieceTime = 100 * time.Microsecond
	// holeSearch is the smallest piece, in bytes, before which a hole is looked for. The lseek costs about as much as
	// reading one page. That is too much for the page of a fault, but only a tenth of what reading this many bytes costs.
	holeSearch = 64 << 10
)

// A lane answers the requests of one stream, in order. Its goroutine owns all but the atomics.
type lane struct {
	export *Export
	peer   string
	bulk   bool // the peer says that it is the bulk lane
	loses  bool // the peer accepts lost pages (pagewire.LostKey)

	request pagewire.Request
	reply   pagewire.Reply
	used    int // bytes of reply.Data that hold pages
	piece   int // page bytes that the next reply carries at most, unless one page is larger
	packer  packer

	// Pages of holeBlock in [holeStart, holeEnd) are known to be a hole. The VM is stopped, so it stays one.
	holeBlock          uint32
	holeStart, holeEnd uint64
	scouted            [scouts]scouted // where the peer was told of holes, see holes.go
	scout              int             // the one that was begun last
	searched           uint64          // bytes that the searches for holes count as, with the next request

	counters counters
	reading  atomic.Bool
	idle     chan struct{} // a read ended after the export was withdrawn
}

// A messageStream is what a lane needs of its call.
type messageStream interface {
	Recv(*pagewire.Request) error
	Send(*pagewire.Reply) error
}

func (l *lane) serve(ctx context.Context, stream messageStream) error {
	defer l.reply.Release()
	call := stream
	if l.bulk {
		stream = &sharingStream{
			messageStream: stream, ctx: ctx, shared: &l.export.server.shared, export: l.export, turn: newTurn(),
		}
		stream = &pacedStream{messageStream: stream, link: &l.export.link}
	}
	for {
		if err := stream.Recv(&l.request); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		left, err := l.check()
		if err != nil {
			return err
		}
		if err := l.confirm(ctx, call); err != nil {
			return err
		}
		l.counters.requests.Add(1)
		asked := min(left+l.searched, pagewire.MaxRequestedBytes)
		l.searched = 0
		if waited, err := l.export.quota.take(ctx, asked); err != nil {
			return err
		} else if waited {
			l.counters.throttled.Add(1)
		}
		l.piece = l.firstPiece()
		for _, r := range l.request.Ranges {
			if err := l.answer(stream, r, left); err != nil {
				return err
			}
			left -= uint64(r.Length)
		}
		if err := l.tellHoles(); err != nil {
			return err
		}
		if err := l.flush(stream); err != nil {
			return err
		}
	}
}

// confirm returns nil once the VM was seen stopped. It may take long until it is: the peer asks for what it will need
// before the VM is stopped, and takes a lane that does not answer its PINGs for lost.
func (l *lane) confirm(ctx context.Context, call messageStream) error {
	if a, ok := call.(attendant); ok && !l.export.confirmed.Load() {
		defer a.Attend()()
	}
	return l.export.confirm(ctx)
}

// firstPiece is what the first reply to a request carries at most.
func (l *lane) firstPiece() int {
	switch {
	case l.request.Piece > 0:
		return int(min(max(pagewire.LeastPiece, l.request.Piece), replyData))
	case l.bulk:
		return replyData
	}
	return int(min(max(pagewire.LeastPiece, float64(pieceTime)/l.export.link.cost()), replyData))
}

// check validates all ranges of the request before any is served, and returns the sum of their lengths.
func (l *lane) check() (sum uint64, err error) {
	for i, r := range l.request.Ranges {
		if r.Block >= uint32(len(l.export.ram.blocks)) {
			return 0, endLane(codes.InvalidArgument, ErrBadRange, "range %d: block %d, there are %d",
				i, r.Block, len(l.export.ram.blocks))
		}
		b := &l.export.ram.blocks[r.Block]
		length := uint64(r.Length)
		switch {
		case length == 0 || length%b.PageSize != 0 || r.Offset%b.PageSize != 0:
			return 0, endLane(codes.InvalidArgument, ErrBadRange,
				"range %d: %d bytes at %#x of block %d (%s) are not whole pages of %d bytes",
				i, length, r.Offset, r.Block, b.ID, b.PageSize)
		case r.Offset > b.Size || length > b.Size-r.Offset:
			return 0, endLane(codes.InvalidArgument, ErrBadRange, "range %d: %d bytes at %#x exceed block %d (%s) of %#x bytes",
				i, length, r.Offset, r.Block, b.ID, b.Size)
		}
		sum += length
	}
	if sum > pagewire.MaxRequestedBytes {
		return 0, endLane(codes.InvalidArgument, ErrBadRange,
			"a request for %d bytes, at most %d may be asked for at once", sum, pagewire.MaxRequestedBytes)
	}
	return sum, nil
}

// answer puts the pages of a range into replies and sends those that are full. left counts the bytes of
// this range and those after it.
func (l *lane) answer(stream messageStream, r pagewire.Range, left uint64) error {
	b := &l.export.ram.blocks[r.Block]
	for at, end := r.Offset, r.Offset+uint64(r.Length); at < end; {
		if len(l.reply.Runs) == pagewire.MaxRuns || l.reply.Data != nil && uint64(len(l.reply.Data)-l.used) < b.PageSize {
			if err := l.flush(stream); err != nil {
				return err
			}
		}
		hole, err := l.findHole(r.Block, at, end)
		if err != nil {
			return err
		}
		if hole > at {
			l.add(pagewire.Run{Block: r.Block, Offset: at, Length: uint32(hole - at), Zero: true})
			l.counters.zeroPages.Add((hole - at) / b.PageSize)
			left, at = left-(hole-at), hole
			continue
		}
		if l.reply.Data == nil {
			l.reply.Lease(int(max(min(left, uint64(l.piece)), b.PageSize)))
		}
		// As many pages as fit, even if each of them becomes a run.
		room := min(uint64(len(l.reply.Data)-l.used)/b.PageSize, uint64(pagewire.MaxRuns-len(l.reply.Runs)))
		n := min(end-at, room*b.PageSize)
		pages := l.reply.Data[l.used : l.used+int(n)]
		n, err = l.readable(b, pages, at)
		if errors.Is(err, ErrRAM) { // the peer is to have what comes before, and to know at which page it ended
			if err := l.flush(stream); err != nil {
				return err
			}
		}
		if err != nil {
			return err
		}
		if n == 0 {
			l.add(pagewire.Run{Block: r.Block, Offset: at, Length: uint32(b.PageSize), Lost: true})
			l.counters.lostPages.Add(1)
			left, at = left-b.PageSize, at+b.PageSize
			continue
		}
		l.sort(r.Block, at, pages[:n], int(b.PageSize))
		left, at = left-n, at+n
	}
	l.counters.pages.Add(uint64(r.Length) / b.PageSize)
	return nil
}

// findHole returns the end of the hole at the beginning of [at, end), or at.
func (l *lane) findHole(block uint32, at, end uint64) (uint64, error) {
	if block == l.holeBlock && at >= l.holeStart && at < l.holeEnd {
		return min(l.holeEnd, end), nil
	}
	if end-at < holeSearch {
		return at, nil
	}
	data, err := l.seekData(block, at)
	return min(data, end), err
}

// seekData returns where data may begin, at or behind at: the end of the hole at that place, or at.
func (l *lane) seekData(block uint32, at uint64) (uint64, error) {
	if err := l.begin(); err != nil {
		return 0, err
	}
	data, err := l.export.ram.blocks[block].hole(at)
	if err := l.end(); err != nil {
		return 0, err
	}
	if err != nil && l.export.ram.blocks[block].isLost(err) {
		return at, nil // no hole: each page is read, which says which of them cannot be
	}
	if err != nil {
		return 0, endLane(codes.DataLoss, ErrRAM, "look for a hole at %#x of block %s: %w",
			at, l.export.ram.blocks[block].ID, err)
	}
	if data > at {
		l.holeBlock, l.holeStart, l.holeEnd = block, at, data
	}
	return data, nil
}

// readable fills pages from the block up to the first lost page, and returns the number of bytes filled. 0: the first
// page is lost. On a lane that may not lose pages, that is an error.
func (l *lane) readable(b *openBlock, pages []byte, at uint64) (n uint64, err error) {
	err = l.read(b, pages, at)
	if err == nil || !b.isLost(err) {
		return uint64(len(pages)), err
	}
	for n < uint64(len(pages)) {
		err = l.read(b, pages[n:n+b.PageSize], at+n)
		switch {
		case err == nil:
			n += b.PageSize
		case b.isLost(err) && (l.loses || n > 0):
			return n, nil
		default:
			return n, err
		}
	}
	return n, nil // the page that failed can be read again
}

// read fills pages from the block.
func (l *lane) read(b *openBlock, pages []byte, at uint64) error {
	if err := l.begin(); err != nil {
		return err
	}
	err := b.read(pages, at)
	if err := l.end(); err != nil {
		return err
	}
	if err != nil {
		return endLane(codes.DataLoss, ErrRAM, "%d bytes at %#x of block %s: %w", len(pages), at, b.ID, err)
	}
	return nil
}

// sort makes runs of the pages that were read into the end of the reply's data, and closes the gaps that zero pages
// leave there.
func (l *lane) sort(block uint32, at uint64, pages []byte, pageSize int) {
	zeroPages := uint64(0)
	for i := 0; i < len(pages); i += pageSize {
		page := pages[i : i+pageSize]
		run := pagewire.Run{Block: block, Offset: at + uint64(i), Length: uint32(pageSize), Zero: isZero(page)}
		if run.Zero {
			zeroPages++
		} else {
			if zeroPages > 0 {
				copy(l.reply.Data[l.used:], page)
			}
			l.used += pageSize
		}
		l.add(run)
	}
	l.counters.zeroPages.Add(zeroPages)
}

// add appends a run, as a part of the last one if it continues it.
func (l *lane) add(r pagewire.Run) {
	if n := len(l.reply.Runs); n > 0 {
		last := &l.reply.Runs[n-1]
		if last.Block == r.Block && last.Zero == r.Zero && last.Lost == r.Lost && last.Hole == r.Hole &&
			last.Offset+uint64(last.Length) == r.Offset && last.Length <= math.MaxUint32-r.Length {
			last.Length += r.Length
			return
		}
	}
	l.reply.Runs = append(l.reply.Runs, r)
}

// flush sends the reply, if it has any run. It packs the reply where that pays.
func (l *lane) flush(stream messageStream) error {
	if len(l.reply.Runs) == 0 {
		return nil
	}
	l.reply.Data = l.reply.Data[:l.used]
	l.packer.pack(&l.reply)
	l.counters.replies.Add(1)
	l.counters.pageBytes.Add(uint64(l.used))
	l.counters.bytes.Add(uint64(l.reply.Carried()))
	err := stream.Send(&l.reply)
	l.reply.Release()
	l.reply.Runs, l.used = l.reply.Runs[:0], 0
	if l.request.Piece == 0 {
		l.piece = min(2*l.piece, replyData)
	}
	return err
}

// begin announces a read of RAM; each is followed by end. See the package comment.
func (l *lane) begin() error {
	l.reading.Store(true)
	if l.export.withdrawn.Load() {
		return l.end()
	}
	if l.export.park != nil {
		l.export.park("reading")
	}
	return nil
}

// end ends a read of RAM. An error says that nothing of it may be sent: the VM may have been continued meanwhile.
func (l *lane) end() error {
	l.reading.Store(false)
	if !l.export.withdrawn.Load() {
		return nil
	}
	select {
	case l.idle <- struct{}{}:
	default: // already signalled
	}
	return endLane(codes.Aborted, ErrWithdrawn, "")
}

// awaitIdle waits for the read that is under way; the export is withdrawn, so no other follows.
func (l *lane) awaitIdle() {
	for l.reading.Load() {
		<-l.idle
	}
}
