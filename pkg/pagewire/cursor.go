// SPDX-License-Identifier: Apache-2.0

package pagewire

import (
	"errors"
	"fmt"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
)

// ErrMalformed says that a message of the peer is not a valid frame of a lane. It wraps no other error
// and cannot be repaired by asking again: the peer is broken, hostile or of another version.
var ErrMalformed = errors.New("malformed page message")

func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrMalformed}, args...)...)
}

// A cursor reads a message that lies in any number of pieces, as gRPC delivers it: one piece for each
// HTTP/2 frame, cut anywhere.
type cursor struct {
	rest    mem.BufferSlice // pieces after the current one
	current mem.Buffer      // nil when the message is a slice of somebody's
	piece   []byte          // what is not read yet of current
	left    int             // bytes not read yet of all pieces
}

func newCursor(message mem.BufferSlice) cursor {
	return cursor{rest: message, left: message.Len()}
}

func cursorOf(message []byte) cursor { return cursor{piece: message, left: len(message)} }

// turn moves to the next piece with unread bytes, unless the current one has some. left must be positive.
func (c *cursor) turn() {
	for len(c.piece) == 0 {
		c.current = c.rest[0]
		c.piece = c.current.ReadOnlyData()
		c.rest = c.rest[1:]
	}
}

// varint reads one number. end is the value of left at which the enclosing message ends.
func (c *cursor) varint(end int) (uint64, error) {
	var v uint64
	for shift := 0; shift < 70; shift += 7 {
		if c.left <= end {
			return 0, malformed("ends within a number")
		}
		c.turn()
		b := c.piece[0]
		c.piece = c.piece[1:]
		c.left--
		if shift == 63 && b > 1 {
			break
		}
		v |= uint64(b&0x7f) << shift
		if b < 0x80 {
			return v, nil
		}
	}
	return 0, malformed("a number exceeds 64 bits")
}

// tag reads the number and the wire type of the next field.
func (c *cursor) tag(end int) (protowire.Number, protowire.Type, error) {
	v, err := c.varint(end)
	if err != nil {
		return 0, 0, err
	}
	field, kind := v>>3, protowire.Type(v&7)
	if field < 1 || field > uint64(protowire.MaxValidNumber) {
		return 0, 0, malformed("field number %d", field)
	}
	return protowire.Number(field), kind, nil
}

// length reads the length of a field and checks that so much is left before end.
func (c *cursor) length(end int) (int, error) {
	v, err := c.varint(end)
	if err != nil {
		return 0, err
	}
	if v > uint64(c.left-end) {
		return 0, malformed("a field of %d bytes where %d are left", v, c.left-end)
	}
	return int(v), nil
}

// number reads the value of a known field that is a number of at most limit.
func (c *cursor) number(end int, field protowire.Number, kind protowire.Type, limit uint64) (uint64, error) {
	if kind != protowire.VarintType {
		return 0, malformed("field %d has wire type %d, not a number", field, kind)
	}
	v, err := c.varint(end)
	if err == nil && v > limit {
		err = malformed("field %d is %d, at most %d is possible", field, v, limit)
	}
	return v, err
}

// skip passes over the value of an unknown field, which a newer peer may send. Groups are refused: no
// proto3 file can have them.
func (c *cursor) skip(end int, field protowire.Number, kind protowire.Type) error {
	var n int
	switch kind {
	case protowire.VarintType:
		_, err := c.varint(end)
		return err
	case protowire.Fixed32Type:
		n = 4
	case protowire.Fixed64Type:
		n = 8
	case protowire.BytesType:
		var err error
		if n, err = c.length(end); err != nil {
			return err
		}
	default:
		return malformed("unknown field %d has wire type %d", field, kind)
	}
	if n > c.left-end {
		return malformed("ends within unknown field %d", field)
	}
	c.advance(n)
	return nil
}

// advance passes over n bytes, at most left.
func (c *cursor) advance(n int) {
	c.left -= n
	for n > len(c.piece) {
		n -= len(c.piece)
		c.piece = nil
		c.turn()
	}
	c.piece = c.piece[n:]
}

// copyTo copies all bytes that are left to dst, which has that size.
func (c *cursor) copyTo(dst []byte) {
	n := copy(dst, c.piece)
	c.rest.CopyTo(dst[n:])
	c.left = 0
}
