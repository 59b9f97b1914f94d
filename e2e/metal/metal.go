// SPDX-License-Identifier: Apache-2.0

// Package metal is a guest without an operating system, and the check of the memory that it leaves. The guest counts
// passes over its RAM (see boot.S). Once its VM is stopped, the RAM files show whether a migration lost, aged or
// misplaced a page. It is the guest for KVM on hosts without hardware virtualization.
package metal

import (
	"context"
	_ "embed"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
)

//go:embed boot.S
var source []byte

const (
	sectorSize   = 512
	ramEndOffset = 0x1f0 // of boot.S's ram_end
	name         = 0x6d657461
	pageSize     = 4096

	// First is the address of the first page that the guest counts in.
	First = 2 << 20
	// tail is the end of RAM in which the guest does not count. SeaBIOS keeps tables in the last 16 MiB and has unpacked
	// itself right below; the guest needs pages that are zero.
	tail = 24 << 20

	// MinMiB is the least RAM that the guest counts in.
	MinMiB = 32
	// MaxMiB is the most RAM. Up to here all RAM is below 4 GiB on both pc and q35 machines, without a gap.
	MaxMiB = 2048
	// ImageSize is the size of the boot disk. AHCI boots no 512-byte disk.
	ImageSize = 1 << 20
)

// ErrRAMSize says that the guest cannot have that much RAM.
var ErrRAMSize = errors.New("RAM size out of range")

// End returns the address after the last page in which a guest with that much RAM counts.
func End(ramMiB int) (uint32, error) {
	if ramMiB < MinMiB || ramMiB > MaxMiB {
		return 0, fmt.Errorf("%w: %d MiB is not within %d and %d", ErrRAMSize, ramMiB, MinMiB, MaxMiB)
	}
	return uint32(ramMiB)<<20 - tail, nil
}

// Source returns the assembler source, as a key for caches of what Build makes.
func Source() []byte { return source }

// Build assembles the boot disk for a guest with ramMiB of RAM. It needs as and ld of GNU binutils.
func Build(ctx context.Context, ramMiB int) ([]byte, error) {
	end, err := End(ramMiB)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "migrated-metal-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	src, obj, bin := filepath.Join(dir, "boot.S"), filepath.Join(dir, "boot.o"), filepath.Join(dir, "boot.bin")
	if err := os.WriteFile(src, source, 0o600); err != nil {
		return nil, err
	}
	for _, argv := range [][]string{
		{"as", "--32", "-o", obj, src},
		{"ld", "-m", "elf_i386", "-Ttext", "0x7c00", "-e", "_start", "--oformat", "binary", "-o", bin, obj},
	} {
		if out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput(); err != nil {
			return nil, fmt.Errorf("assemble the bare-metal guest (GNU binutils for x86 are needed): %s: %w: %s",
				argv[0], err, out)
		}
	}
	sector, err := os.ReadFile(bin)
	if err != nil {
		return nil, err
	}
	if len(sector) != sectorSize {
		return nil, fmt.Errorf("assemble the bare-metal guest: %d bytes are no boot sector", len(sector))
	}
	disk := make([]byte, ImageSize)
	copy(disk, sector)
	binary.LittleEndian.PutUint32(disk[ramEndOffset:], end)
	return disk, nil
}

// Pass returns the pass number in a line from the guest's serial port.
func Pass(line string) (uint32, error) {
	n, err := strconv.ParseUint(line, 16, 32)
	if err != nil || len(line) != 8 {
		return 0, fmt.Errorf("line %q of the bare-metal guest is no pass number", line)
	}
	return uint32(n), nil
}
