// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
)

// QEMU before 8.1 does not say where a RAM block is, and gpa2hva knows only what is mapped into the guest at the
// moment: no option ROM, no ACPI table. But QEMU has that in memory itself. A struct RAMBlock (include/exec/ramblock.h,
// from 2.11 to 8.0) lies on its heap:
//
//	 0  rcu, mr               three pointers
//	24  host                  address of the first byte: what is wanted
//	32  colo_cache            pointer
//	40  offset                unique among the blocks, as "info ramblock" says it
//	48  used_length           likewise
//	56  max_length            likewise
//	64  resized               pointer
//	72  flags                 32 bits
//	76  idstr                 256 bytes: the name, as "info ramblock" says it, and zeros
//
// A place counts only if all four things that QEMU told are there, and only if it is the only one. Whoever uses the
// address holds it against the process' mappings besides.
const (
	blockHost   = 24
	blockOffset = 40
	blockName   = 76
	blockEnd    = blockName + 256
)

// heapChunk is how much of QEMU's memory is read at a time, and heapMost the largest mapping that is looked through:
// heaps are smaller, and RAM is not.
const (
	heapChunk = 1 << 20
	heapMost  = 1 << 30
)

// A heapSearch knows where in QEMU's heap the blocks are described that were found before.
type heapSearch struct {
	structs map[uint64]uint64 // by the blocks' offsets
}

// wantedBlocks are those that a search is for, by their offsets.
type wantedBlocks struct {
	byOffset     map[uint64]*listedBlock
	offset, used uint64 // the largest of each: most words of a heap are pointers, and larger
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

// missing returns a block that was not found yet, or nil.
func (w *wantedBlocks) missing() *listedBlock {
	for _, b := range w.byOffset {
		if b.addr == 0 {
			return b
		}
	}
	return nil
}

// find sets the addresses of blocks that have none. What was found before is looked at first, and believed if it still
// says the same.
func (h *heapSearch) find(pid int, maps []vma, blocks []listedBlock) error {
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
	// Blocks are made by QEMU's first thread, whose heap this is. Others have their own; those come second.
	for _, first := range []bool{true, false} {
		for _, m := range maps {
			heap := m.path == "[heap]"
			if m.shared || !m.writable || heap != first || m.inode != 0 || m.end-m.start > heapMost || !heap && m.path != "" {
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

// again looks where the blocks were found before.
func (h *heapSearch) again(memory io.ReaderAt, w *wantedBlocks) error {
	buf := make([]byte, blockEnd)
	for offset, at := range h.structs {
		if b := w.byOffset[offset]; b != nil {
			if _, err := memory.ReadAt(buf, int64(at)); err != nil {
				continue // it was freed
			}
			if err := h.chunk(buf, at, w); err != nil {
				return err
			}
		}
	}
	return nil
}

// search looks through one mapping.
func (h *heapSearch) search(memory io.ReaderAt, m vma, w *wantedBlocks) error {
	buf := make([]byte, heapChunk+blockEnd)
	for at := m.start; at < m.end; at += heapChunk {
		n, err := memory.ReadAt(buf[:min(uint64(len(buf)), m.end-at)], int64(at))
		if err != nil && !errors.Is(err, io.EOF) && n == 0 {
			return nil // it was unmapped meanwhile, as heaps are; what is not found is an error
		}
		if err := h.chunk(buf[:n], at, w); err != nil {
			return err
		}
	}
	return nil
}

// chunk looks for structs that begin in the first heapChunk bytes of a chunk of QEMU's memory at addr. malloc(3) aligns
// them to 16 bytes.
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
