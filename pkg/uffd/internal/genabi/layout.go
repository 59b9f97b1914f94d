// SPDX-License-Identifier: Apache-2.0

package main

import "fmt"

// scalars are the header's integer types. On 64-bit Linux each is aligned to its size.
var scalars = map[string]struct {
	size   int
	goType string
}{
	"__u8":  {1, "uint8"},
	"__u16": {2, "uint16"},
	"__u32": {4, "uint32"},
	"__u64": {8, "uint64"},
	"__s64": {8, "int64"},
}

// layout sets the offset of every field and the size of every record.
func (h *header) layout() error {
	for _, r := range h.structs {
		if err := r.layout(); err != nil {
			return fmt.Errorf("struct %s: %w", r.name, err)
		}
	}
	return nil
}

// layout follows the C rules. Members are in order, each aligned to its type (to 1 if packed); those of a union
// are all at 0. The size is rounded up to the alignment. Packing does not apply to inner records.
func (r *record) layout() error {
	r.align = 1
	end := 0
	for _, f := range r.fields {
		var size, align int
		if f.rec != nil {
			if f.rec.size == 0 {
				if err := f.rec.layout(); err != nil {
					return fmt.Errorf("%s: %w", f.name, err)
				}
			}
			size, align = f.rec.size, f.rec.align
		} else {
			size = scalars[f.scalar].size
			align = size
		}
		if r.packed {
			align = 1
		}
		r.align = max(r.align, align)
		if r.union {
			r.size = max(r.size, size)
			continue
		}
		f.offset = roundUp(end, align)
		if f.offset != end {
			return fmt.Errorf("%s: padding before it would have to be written out in Go", f.name)
		}
		end = f.offset + size
		r.size = end
	}
	r.size = roundUp(r.size, r.align)
	if r.size == 0 {
		return fmt.Errorf("it is empty")
	}
	return nil
}

func roundUp(n, to int) int { return (n + to - 1) / to * to }
