// SPDX-License-Identifier: Apache-2.0

package handover

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"

	"github.com/migrated-vm/migrated/pkg/uffd"
)

// maxPageSize is the largest page size of Linux in bytes: 16 GiB, on arm64 with 64 KiB base pages. amd64 has 1 GiB.
const maxPageSize = 16 << 30

// ErrInvalid is what errors.Is finds in every error about a message's content.
var ErrInvalid = errors.New("invalid hand-over message")

// Mapping is a piece of guest memory in the monitor's address space, in bytes.
type Mapping struct {
	BaseHostVirtAddr uint64 // its address in the monitor
	Size             uint64
	Offset           uint64 // of its content in the snapshot's memory file
	PageSize         uint64
}

// Range is the mapping's range in the monitor's address space, for the userfaultfd.
func (m Mapping) Range() uffd.Range { return uffd.Range{Start: m.BaseHostVirtAddr, Len: m.Size} }

// check refuses a mapping that no kernel can have made.
func (m Mapping) check() error {
	p := m.PageSize
	switch {
	case p < uint64(os.Getpagesize()) || p > maxPageSize || p&(p-1) != 0:
		return fmt.Errorf("%w: page size %d is not a power of two between %d and %d",
			ErrInvalid, p, os.Getpagesize(), uint64(maxPageSize))
	case m.Size == 0:
		return fmt.Errorf("%w: size 0", ErrInvalid)
	case (m.BaseHostVirtAddr|m.Size|m.Offset)&(p-1) != 0:
		return fmt.Errorf("%w: address %#x, size %#x or offset %#x is no multiple of the page size %#x",
			ErrInvalid, m.BaseHostVirtAddr, m.Size, m.Offset, p)
	case m.Size > math.MaxInt64, m.BaseHostVirtAddr > math.MaxInt64-m.Size, m.Offset > math.MaxInt64-m.Size:
		// User addresses and file offsets are below 2^63.
		return fmt.Errorf("%w: address %#x or offset %#x plus size %#x overflows",
			ErrInvalid, m.BaseHostVirtAddr, m.Offset, m.Size)
	}
	return nil
}

// checkAll checks each mapping, and that no two overlap in addresses or in file offsets.
func checkAll(mappings []Mapping) error {
	if len(mappings) == 0 {
		return fmt.Errorf("%w: no mappings", ErrInvalid)
	}
	for i, m := range mappings {
		if err := m.check(); err != nil {
			return fmt.Errorf("mapping %d: %w", i, err)
		}
	}
	for what, start := range map[string]func(Mapping) uint64{
		"addresses": func(m Mapping) uint64 { return m.BaseHostVirtAddr },
		"offsets":   func(m Mapping) uint64 { return m.Offset },
	} {
		sorted := slices.SortedFunc(slices.Values(mappings), func(a, b Mapping) int {
			return cmp.Compare(start(a), start(b))
		})
		for i := 1; i < len(sorted); i++ {
			if end := start(sorted[i-1]) + sorted[i-1].Size; start(sorted[i]) < end {
				return fmt.Errorf("%w: the %s of two mappings overlap at %#x", ErrInvalid, what, start(sorted[i]))
			}
		}
	}
	return nil
}
