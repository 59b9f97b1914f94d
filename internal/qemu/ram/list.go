// SPDX-License-Identifier: Apache-2.0

package ram

import (
	"context"
	"fmt"
	"strconv"
	"strings"
)

// A listedBlock is one RAMBlock: a line of HMP's "info ramblock" (ram_block_format in QEMU's physmem.c).
type listedBlock struct {
	name     string // empty: the block is not migrated (memory_region_init_ram_nomigrate, an unused memory backend)
	pageSize uint64 // bytes
	offset   uint64 // in QEMU's space of RAM addresses; unique
	used     uint64 // bytes
	max      uint64 // bytes; more than used if the block can grow (ACPI tables)
	addr     uint64 // of the first byte in QEMU's address space; 0: QEMU before 8.1 does not report it
}

// listBlocks asks QEMU for all of its RAM blocks, with HMP because QMP has no such command.
func (mem *Memory) listBlocks(ctx context.Context) ([]listedBlock, error) {
	text, err := mem.qmp.HMP(ctx, "info ramblock")
	if err != nil {
		return nil, err
	}
	return parseBlocks(text)
}

// parseBlocks parses the table. Its columns are the name, the page size ("4 KiB"), offset, used and total size and,
// since 8.1, the address and "ro" or "rw".
func parseBlocks(text string) ([]listedBlock, error) {
	var blocks []listedBlock
	header := true
	for line := range strings.Lines(text) {
		if strings.TrimSpace(line) == "" {
			continue
		}
		if header {
			if !strings.Contains(line, "Block Name") {
				return nil, fmt.Errorf("QEMU's info ramblock begins with %q", line)
			}
			header = false
			continue
		}
		b, err := parseBlock(strings.Fields(line))
		if err != nil {
			return nil, fmt.Errorf("QEMU's info ramblock, line %q: %w", line, err)
		}
		blocks = append(blocks, b)
	}
	if len(blocks) == 0 {
		return nil, fmt.Errorf("QEMU's info ramblock lists no block: %q", text)
	}
	return blocks, nil
}

func parseBlock(fields []string) (b listedBlock, err error) {
	numbers := 0 // index of the first number
	for numbers < len(fields) && !strings.HasPrefix(fields[numbers], "0x") {
		numbers++
	}
	if numbers < 2 || len(fields) < numbers+3 {
		return b, fmt.Errorf("%d columns", len(fields))
	}
	b.name = strings.Join(fields[:numbers-2], " ")
	if b.pageSize, err = parseSize(fields[numbers-2], fields[numbers-1]); err != nil {
		return b, err
	}
	for i, value := range []*uint64{&b.offset, &b.used, &b.max, &b.addr} {
		if at := numbers + i; at < len(fields) && strings.HasPrefix(fields[at], "0x") {
			if *value, err = strconv.ParseUint(fields[at][2:], 16, 64); err != nil {
				return b, err
			}
		}
	}
	if b.used == 0 || b.used > b.max || b.pageSize == 0 {
		return b, fmt.Errorf("%d of %d bytes are used, in pages of %d", b.used, b.max, b.pageSize)
	}
	return b, nil
}

// parseSize parses a size as size_to_str in QEMU's util/cutils.c writes it: "4 KiB".
func parseSize(number, unit string) (uint64, error) {
	n, err := strconv.ParseUint(number, 10, 32)
	if err != nil {
		return 0, err
	}
	shift := strings.Index("B KiBMiBGiB", unit)
	if shift < 0 || unit == "" {
		return 0, fmt.Errorf("unit %q", unit)
	}
	return n << (10 * ((shift + 1) / 3)), nil
}
