// SPDX-License-Identifier: Apache-2.0

package devicestate

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
)

// A device state of a megabyte differs from an earlier one by a few KB: of the 50 KB that a virtio device writes, a few
// bytes change while it works. The reader has all sections of the earlier state. Changes are encoded like this, with
// numbers as in encoding/binary's Uvarint, for each section that is sent:
//
//	0  length  bytes                                           a section that the earlier state did not have
//	1 + index  pieces, and for each: gap  length  bytes        the section with that index, where these pieces are
//	                                                           replaced; a gap counts from the end of the previous piece

// maxGap is the number of equal bytes between two differences below which one piece is shorter than two.
const maxGap = 4

// ErrChanges says that changes do not fit the earlier state.
var ErrChanges = errors.New("the changes of the device state have a form that is not known")

// Changes encodes what turns the state early into the state now: the sections that early does not have, those that
// differ, and those for which always(index in early) is true. The error is ErrOtherForm if a section cannot be loaded
// again, or is missing in now, or if a guest may have made a section of now: a part of a device's data would be
// left out.
func Changes(early, now []Section, always func(index int) bool) (b []byte, err error) {
	if err := checkOneSplit(now); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrOtherForm, err)
	}
	index := make(map[key]int, len(early))
	for i, k := range keysOf(early) {
		index[k] = i
	}
	for n, k := range keysOf(now) {
		i, known := index[k]
		if !known {
			b = appendBytes(binary.AppendUvarint(b, 0), now[n].Bytes)
			continue
		}
		delete(index, k)
		if bytes.Equal(early[i].Bytes, now[n].Bytes) && !always(i) {
			continue
		}
		if err := checkForm(early[i], now[n]); err != nil {
			return nil, err
		}
		b = binary.AppendUvarint(b, uint64(1+i))
		b = appendDifference(b, early[i].Bytes, now[n].Bytes)
	}
	for k := range index {
		return nil, fmt.Errorf("%w: the VM has no %q any more", ErrOtherForm, k.name)
	}
	return b, nil
}

// appendBytes appends the length of data, and data.
func appendBytes(b, data []byte) []byte {
	return append(binary.AppendUvarint(b, uint64(len(data))), data...)
}

// appendDifference appends the pieces that turn was into is. Both have the same length.
func appendDifference(b, was, is []byte) []byte {
	type piece struct{ from, to int }
	var pieces []piece
	for i := range is {
		if was[i] == is[i] {
			continue
		}
		if n := len(pieces); n > 0 && i-pieces[n-1].to < maxGap {
			pieces[n-1].to = i + 1
			continue
		}
		pieces = append(pieces, piece{i, i + 1})
	}
	b = binary.AppendUvarint(b, uint64(len(pieces)))
	end := 0
	for _, p := range pieces {
		b = appendBytes(binary.AppendUvarint(b, uint64(p.from-end)), is[p.from:p.to])
		end = p.to
	}
	return b
}

// A Change is a section that differs from the earlier state, or that the earlier state did not have.
type Change struct {
	Of int // its index in the earlier state; -1: not in the earlier state
	Section
}

// ParseChanges decodes what Changes has encoded against early. It returns the sections in the order in which they are
// to be loaded, with at most Most bytes together. early is not changed.
func ParseChanges(early []Section, changes []byte) ([]Change, error) {
	r := changesReader{rest: changes}
	var list []Change
	total := 0
	for len(r.rest) > 0 {
		c := Change{Of: -1}
		var state []byte
		switch i := r.number(); {
		case i == 0:
			state = r.bytes()
		case i > uint64(len(early)):
			r.fail("section %d of %d", i-1, len(early))
		default:
			c.Of = int(i - 1)
			state = r.replacePieces(early[c.Of].Bytes)
		}
		if total += len(state); total > Most {
			r.fail("more than %d bytes", Most)
		}
		if r.err != nil {
			return nil, r.err
		}
		var err error
		if c.Section, err = parseWhole(state); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrChanges, err)
		}
		list = append(list, c)
	}
	return list, nil
}

// A changesReader decodes changes. After an error it returns zeros.
type changesReader struct {
	rest []byte
	err  error
}

func (r *changesReader) fail(format string, args ...any) {
	if r.err == nil {
		r.err = fmt.Errorf("%w: "+format, append([]any{ErrChanges}, args...)...)
	}
}

func (r *changesReader) number() uint64 {
	v, n := binary.Uvarint(r.rest)
	if n <= 0 {
		r.fail("half a number")
		return 0
	}
	r.rest = r.rest[n:]
	return v
}

func (r *changesReader) bytes() []byte {
	n := r.number()
	if n > uint64(len(r.rest)) {
		r.fail("%d bytes of %d", n, len(r.rest))
		return nil
	}
	b := r.rest[:n]
	r.rest = r.rest[n:]
	return b
}

// replacePieces decodes pieces, and returns a copy of was with them.
func (r *changesReader) replacePieces(was []byte) []byte {
	pieces := r.number()
	is := append([]byte(nil), was...)
	offset := uint64(0)
	for ; pieces > 0 && r.err == nil; pieces-- {
		gap, b := r.number(), r.bytes()
		if left := uint64(len(is)) - offset; gap > left || uint64(len(b)) > left-gap {
			r.fail("a piece that ends behind the section")
			break
		}
		offset += gap
		offset += uint64(copy(is[offset:], b))
	}
	return is
}

// Merge returns early with changes applied. Sections that early does not have are at the end.
func Merge(early []Section, changes []Change) []Section {
	merged := append([]Section(nil), early...)
	for _, c := range changes {
		if c.Of < 0 {
			merged = append(merged, c.Section)
		} else {
			merged[c.Of] = c.Section
		}
	}
	return merged
}
