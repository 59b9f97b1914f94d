// SPDX-License-Identifier: Apache-2.0

package pagewire

import (
	"math"

	"google.golang.org/protobuf/encoding/protowire"
)

// Decoding accepts what protobuf accepts, with these exceptions, all of which no daemon sends: a known field with a
// foreign wire type, a number that does not fit its field (such as an unknown compression, which nobody announced),
// groups, data that is followed by anything, and messages that exceed the limits or contradict themselves.

// Decode decodes message into r. Errors are ErrMalformed.
func (r *Request) Decode(message []byte) error { return decodeRequest(cursorOf(message), r) }

// Decode decodes message into r. Unless Data was packed, it is a part of message, and valid as long as that. Errors are
// ErrMalformed.
func (r *Reply) Decode(message []byte) error { return decodeReply(cursorOf(message), r) }

func decodeRequest(c cursor, r *Request) error {
	r.Ranges, r.Holes, r.Piece = r.Ranges[:0], false, 0
	for c.left > 0 {
		field, kind, err := c.tag(0)
		if err != nil {
			return err
		}
		switch field {
		case fieldRanges:
			if len(r.Ranges) == MaxRanges {
				return malformed("more than %d ranges", MaxRanges)
			}
			var run Run
			if run, err = c.run(kind, false); err == nil {
				r.Ranges = append(r.Ranges, Range{Block: run.Block, Offset: run.Offset, Length: run.Length})
			}
		case fieldHoles:
			var v uint64
			v, err = c.number(0, field, kind, math.MaxUint64)
			r.Holes = v != 0
		case fieldPiece:
			var v uint64
			v, err = c.number(0, field, kind, math.MaxUint32)
			r.Piece = uint32(v)
		default:
			err = c.skip(0, field, kind)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func decodeReply(c cursor, r *Reply) error {
	r.Release()
	r.Runs = r.Runs[:0]
	if c.left > MaxReplyBytes {
		return malformed("reply of %d bytes, at most %d are possible", c.left, MaxReplyBytes)
	}
	carried := uint64(0) // cannot overflow: MaxRuns 32-bit lengths
	for c.left > 0 {
		field, kind, err := c.tag(0)
		if err != nil {
			return err
		}
		switch field {
		case fieldRuns:
			if len(r.Runs) == MaxRuns {
				return malformed("more than %d runs", MaxRuns)
			}
			run, err := c.run(kind, true)
			if err != nil {
				return err
			}
			if run.Length == 0 {
				return malformed("a run without pages")
			}
			if run.Zero && run.Lost || run.Hole && (run.Zero || run.Lost) {
				return malformed("a run with more than one of zero, lost and hole")
			}
			if run.Carries() {
				carried += uint64(run.Length)
			}
			r.Runs = append(r.Runs, run)
		case fieldCompression:
			v, err := c.number(0, field, kind, uint64(compressions-1))
			if err != nil {
				return err
			}
			r.compression = Compression(v)
		case fieldData:
			return c.data(kind, carried, r)
		default:
			if err := c.skip(0, field, kind); err != nil {
				return err
			}
		}
	}
	if carried != 0 {
		return malformed("no data for runs of %d bytes", carried)
	}
	return nil
}

// data reads the data field, which must be the last one.
func (c *cursor) data(kind protowire.Type, carried uint64, r *Reply) error {
	if kind != protowire.BytesType {
		return malformed("data has wire type %d", kind)
	}
	n, err := c.length(0)
	if err != nil {
		return err
	}
	switch {
	case n > MaxData:
		return malformed("data of %d bytes, at most %d are possible", n, MaxData)
	case n != c.left:
		return malformed("%d bytes after the data", c.left-n)
	case r.compression != None:
		return c.unpack(n, carried, r)
	case uint64(n) != carried:
		return malformed("data of %d bytes for runs of %d", n, carried)
	case n == 0:
		return nil
	}
	c.turn()
	if len(c.piece) == n {
		if r.Data = c.piece; c.current != nil {
			c.current.Ref()
			r.held = c.current
		}
		return nil
	}
	if cap(r.own) < n {
		r.own = make([]byte, n)
	}
	r.Data = r.own[:n]
	c.copyTo(r.Data)
	return nil
}

// run reads a PageRun, or a PageRange, in which zero, lost and hole are unknown fields.
func (c *cursor) run(kind protowire.Type, hasZero bool) (Run, error) {
	var r Run
	if kind != protowire.BytesType {
		return r, malformed("a run has wire type %d", kind)
	}
	n, err := c.length(0)
	if err != nil {
		return r, err
	}
	end := c.left - n
	for c.left > end {
		field, kind, err := c.tag(end)
		if err != nil {
			return r, err
		}
		var v uint64
		switch {
		case field == fieldBlock:
			v, err = c.number(end, field, kind, math.MaxUint32)
			r.Block = uint32(v)
		case field == fieldOffset:
			r.Offset, err = c.number(end, field, kind, math.MaxUint64)
		case field == fieldLength:
			v, err = c.number(end, field, kind, math.MaxUint32)
			r.Length = uint32(v)
		case field == fieldZero && hasZero:
			v, err = c.number(end, field, kind, math.MaxUint64)
			r.Zero = v != 0
		case field == fieldLost && hasZero:
			v, err = c.number(end, field, kind, math.MaxUint64)
			r.Lost = v != 0
		case field == fieldHole && hasZero:
			v, err = c.number(end, field, kind, math.MaxUint64)
			r.Hole = v != 0
		default:
			err = c.skip(end, field, kind)
		}
		if err != nil {
			return r, err
		}
	}
	if r.Offset > math.MaxUint64-uint64(r.Length) {
		return r, malformed("a run of %d bytes at %#x ends beyond 64 bits", r.Length, r.Offset)
	}
	return r, nil
}
