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

// findInHeap sets the addresses of blocks that have none.
func findInHeap(pid int, maps []vma, blocks []listedBlock) error {
	memory, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return fmt.Errorf("memory of QEMU: %w", err)
	}
	defer memory.Close()
	wanted := make(map[uint64]*listedBlock)
	for i := range blocks {
		if b := &blocks[i]; b.addr == 0 && b.name != "" {
			wanted[b.offset] = b
		}
	}
	// Blocks are made by QEMU's first thread, whose heap this is. Others have their own; those come second.
	for _, first := range []bool{true, false} {
		for _, m := range maps {
			heap := m.path == "[heap]"
			if m.shared || !m.writable || heap != first || m.inode != 0 || m.end-m.start > heapMost || !heap && m.path != "" {
				continue
			}
			if err := searchHeap(memory, m, wanted); err != nil {
				return err
			}
		}
		if missing := missingBlock(wanted); missing == nil {
			return nil
		} else if !first {
			return fmt.Errorf("QEMU's RAM block %q is not found in its memory", missing.name)
		}
	}
	return nil
}

func missingBlock(wanted map[uint64]*listedBlock) *listedBlock {
	for _, b := range wanted {
		if b.addr == 0 {
			return b
		}
	}
	return nil
}

// searchHeap looks through one mapping.
func searchHeap(memory io.ReaderAt, m vma, wanted map[uint64]*listedBlock) error {
	buf := make([]byte, heapChunk+blockEnd)
	for at := m.start; at < m.end; at += heapChunk {
		n, err := memory.ReadAt(buf[:min(uint64(len(buf)), m.end-at)], int64(at))
		if err != nil && !errors.Is(err, io.EOF) && n == 0 {
			return nil // it was unmapped meanwhile, as heaps are; what is not found is an error
		}
		if err := searchChunk(buf[:n], wanted); err != nil {
			return err
		}
	}
	return nil
}

// searchChunk looks for structs that begin in the first heapChunk bytes. malloc(3) aligns them to 16 bytes.
func searchChunk(chunk []byte, wanted map[uint64]*listedBlock) error {
	word := func(at int) uint64 { return binary.LittleEndian.Uint64(chunk[at:]) }
	for at := 0; at+blockEnd <= len(chunk) && at < heapChunk; at += 16 {
		b := wanted[word(at+blockOffset)]
		if b == nil || word(at+blockOffset+8) != b.used || word(at+blockOffset+16) != b.max {
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
		b.addr = host
	}
	return nil
}
