// SPDX-License-Identifier: Apache-2.0

package ram

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/migrated-vm/migrated/internal/qemu/process"
)

// QEMU before 8.1 does not report where a RAM block is. gpa2hva only finds what is mapped into the guest at the moment:
// no option ROM, no ACPI table. But QEMU stores the addresses in its own memory. A struct RAMBlock
// (include/exec/ramblock.h, from 2.11 to 8.0) lies on its heap:
//
//	 0  rcu, mr               three pointers
//	24  host                  address of the first byte; this is the wanted field
//	32  colo_cache            pointer
//	40  offset                unique among the blocks, as in "info ramblock"
//	48  used_length           as in "info ramblock"
//	56  max_length            as in "info ramblock"
//	64  resized               pointer
//	72  flags                 32 bits
//	76  idstr                 256 bytes: the name, as in "info ramblock", and zeros
//
// A match must have all four values that QEMU reported, and must be the only one. The users of the address also compare
// it with the mappings of the process.
const (
	blockHost   = 24
	blockOffset = 40
	blockName   = 76
	blockEnd    = blockName + 256
)

// heapChunk is how many bytes of QEMU's memory are read at a time. heapMost is the size of the largest mapping that is
// searched: heaps are smaller, and RAM usually is larger.
const (
	heapChunk = 1 << 20
	heapMost  = 1 << 30
)

// A heapSearch remembers where in QEMU's heap it found the struct of each block.
type heapSearch struct {
	structs map[uint64]uint64 // address of the struct by the block's offset
}

// wantedBlocks are the blocks without an address, by offset.
type wantedBlocks struct {
	byOffset     map[uint64]*listedBlock
	offset, used uint64 // the largest of each: most words of a heap are pointers, which are larger
}

func wanted(blocks []listedBlock) *wantedBlocks {
	w := &wantedBlocks{byOffset: make(map[uint64]*listedBlock)}
	for i := range blocks {
		if b := &blocks[i]; b.addr == 0 && b.name != "" {
			w.byOffset[b.offset] = b
			w.offset, w.used = max(w.offset, b.offset), max(w.used, b.used)
		}
	}
	return w
}

// missing returns a block that has not been found yet, or nil.
func (w *wantedBlocks) missing() *listedBlock {
	for _, b := range w.byOffset {
		if b.addr == 0 {
			return b
		}
	}
	return nil
}

// find sets the addresses of blocks that have none. It first reads again the structs that it found before, and uses
// those that still have the same values.
func (h *heapSearch) find(pid int, maps process.Maps, blocks []listedBlock) error {
	memory, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return fmt.Errorf("memory of QEMU: %w", err)
	}
	defer memory.Close()
	w := wanted(blocks)
	if h.structs == nil {
		h.structs = make(map[uint64]uint64)
	}
	if err := h.again(memory, w); err != nil || w.missing() == nil {
		return err
	}
	// QEMU's first thread allocates the blocks from its heap ("[heap]"). Other threads have heaps of their own, which are
	// searched second.
	for _, first := range []bool{true, false} {
		for _, m := range maps {
			heap := m.Path == "[heap]"
			if m.Shared || !m.Writable || heap != first || m.Inode != 0 || m.End-m.Start > heapMost || !heap && m.Path != "" {
				continue
			}
			if err := h.search(memory, m, w); err != nil {
				return err
			}
		}
		if missing := w.missing(); missing == nil {
			return nil
		} else if !first {
			return fmt.Errorf("QEMU's RAM block %q is not found in its memory", missing.name)
		}
	}
	return nil
}

// again searches at the places where blocks were found before.
func (h *heapSearch) again(memory io.ReaderAt, w *wantedBlocks) error {
	buf := make([]byte, blockEnd)
	for offset, at := range h.structs {
		if b := w.byOffset[offset]; b != nil {
			if _, err := memory.ReadAt(buf, int64(at)); err != nil {
				continue // the struct was freed
			}
			if err := h.chunk(buf, at, w); err != nil {
				return err
			}
		}
	}
	return nil
}

// search searches one mapping.
func (h *heapSearch) search(memory io.ReaderAt, m process.Mapping, w *wantedBlocks) error {
	buf := make([]byte, heapChunk+blockEnd)
	for at := m.Start; at < m.End; at += heapChunk {
		n, err := memory.ReadAt(buf[:min(uint64(len(buf)), m.End-at)], int64(at))
		if err != nil && !errors.Is(err, io.EOF) && n == 0 {
			return nil // unmapped meanwhile, as heaps can be; find reports blocks that are missing
		}
		if err := h.chunk(buf[:n], at, w); err != nil {
			return err
		}
	}
	return nil
}

// chunk searches for structs that begin in the first heapChunk bytes of chunk. addr is the address of chunk in QEMU's
// memory. malloc(3) aligns the structs to 16 bytes.
func (h *heapSearch) chunk(chunk []byte, addr uint64, w *wantedBlocks) error {
	word := func(at int) uint64 { return binary.LittleEndian.Uint64(chunk[at:]) }
	for at := 0; at+blockEnd <= len(chunk) && at < heapChunk; at += 16 {
		offset, used := word(at+blockOffset), word(at+blockOffset+8)
		if offset > w.offset || used > w.used || used == 0 {
			continue
		}
		b := w.byOffset[offset]
		if b == nil || used != b.used || word(at+blockOffset+16) != b.max {
			continue
		}
		name, rest, terminated := bytes.Cut(chunk[at+blockName:at+blockEnd], []byte{0})
		if !terminated || string(name) != b.name || len(bytes.Trim(rest, "\x00")) != 0 {
			continue
		}
		host := word(at + blockHost)
		if b.addr != 0 && b.addr != host {
			return fmt.Errorf("QEMU's memory has two places that look like its RAM block %q", b.name)
		}
		b.addr, h.structs[offset] = host, addr+uint64(at)
	}
	return nil
}
