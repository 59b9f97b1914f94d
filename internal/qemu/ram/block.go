// SPDX-License-Identifier: Apache-2.0

package ram

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/qemu/process"
)

// A Block is one RAM block of the VM and its place in QEMU: guest RAM, but also firmware, video memory, flash and
// option ROMs. All fields are the same at source and destination except Addr and those about the file.
type Block struct {
	ID       string // QEMU's name of the block (RAMBlock.idstr)
	Size     uint64 // bytes in use
	PageSize uint64 // bytes: of a page of the host, or of a huge page

	Addr uint64 // of the first byte, in QEMU's address space
	// ReadOnly means that QEMU itself cannot write to it, for example to the image of a read-only nvdimm.
	ReadOnly bool
	// Populated means that QEMU has to have all of its memory from the beginning (prealloc=on, -overcommit mem-lock=on).
	Populated bool
	// HoldsFirstPage means that the guest sees the block at address 0.
	HoldsFirstPage bool
	// Private means that only QEMU has this memory; it ends with QEMU.
	Private bool

	// File is QEMU's name of the file that it maps there; empty: no file.
	File string
	// Path opens that file while QEMU lives, even after the file was unlinked. It is empty when there is no file or the
	// file cannot be opened. The file of a private mapping lacks what QEMU has written.
	Path       string
	FileOffset int64 // of the first byte, in the file
	// FileIdentity identifies the file of a shared mapping among the files of all hosts. It is empty for other memory.
	FileIdentity string
	// Present is how many bytes of that file exist, in memory or swapped out. It is 0 for other memory.
	Present uint64

	backend string // id of its -object memory-backend-*; empty: none
	maxSize uint64 // of the mapping
	behind  bool   // private mapping of a file not on hugetlbfs; its content shows wherever QEMU has not written
}

// IsBackend reports whether the block is an -object memory-backend-* of the user, or the one that QEMU makes for -m.
func (b Block) IsBackend() bool { return b.backend != "" }

// An Error explains why memory of the VM cannot be moved.
type Error struct {
	ID     string // of the RAM block
	Reason string
	Remedy string
}

func (e *Error) Error() string { return fmt.Sprintf("RAM %q: %s; %s", e.ID, e.Reason, e.Remedy) }

// Blocks returns all memory of the VM that QEMU's own migration would move, sorted by ID. For each block that cannot be
// moved the error contains an *Error, joined.
func (mem *Memory) Blocks(ctx context.Context) ([]Block, error) {
	listed, err := mem.listBlocks(ctx)
	if err != nil {
		return nil, err
	}
	listed = slices.DeleteFunc(listed, func(b listedBlock) bool { return b.name == "" })
	slices.SortFunc(listed, func(a, b listedBlock) int { return cmp.Compare(a.name, b.name) })
	maps, err := process.ReadMaps(mem.process.PID())
	if err != nil {
		return nil, err
	}
	if slices.ContainsFunc(listed, func(b listedBlock) bool { return b.addr == 0 }) {
		if err := mem.heap.find(mem.process.PID(), maps, listed); err != nil {
			return nil, err
		}
	}
	first, err := mem.firstPage(ctx, listed)
	if err != nil {
		return nil, err
	}
	backends, err := mem.memoryBackends(ctx)
	if err != nil {
		return nil, err
	}
	locked, err := mem.locked()
	if err != nil {
		return nil, err
	}
	var blocks []Block
	var failed []error
	for _, l := range listed {
		b, err := mem.locate(l, maps)
		if err != nil {
			failed = append(failed, err)
			continue
		}
		backend, found := backends[strings.TrimPrefix(b.ID, "/objects/")]
		if found {
			b.backend = backend.ID
		}
		b.HoldsFirstPage = b.Addr == first
		b.Populated = !b.ReadOnly && (locked || backend.Prealloc)
		blocks = append(blocks, b)
	}
	return blocks, errors.Join(failed...)
}

// firstPage returns where QEMU has the guest's address 0, which is RAM on every PC. It returns an error if no listed
// block contains that place, and 0 if no RAM is at the guest's address 0.
func (mem *Memory) firstPage(ctx context.Context, listed []listedBlock) (addr uint64, err error) {
	addr, err = mem.HostAddress(ctx, 0)
	if addr == 0 || err != nil { // another kind of machine, or a guest that has mapped something else there
		return 0, err
	}
	if !slices.ContainsFunc(listed, func(b listedBlock) bool { return addr >= b.addr && addr < b.addr+b.max }) {
		return 0, fmt.Errorf("QEMU has the guest's first page at %#x, where no RAM block was found", addr)
	}
	return addr, nil
}

// HostAddress returns the address in QEMU of a byte of guest memory, given its guest-physical address. It returns 0 if
// there is no RAM.
func (mem *Memory) HostAddress(ctx context.Context, physical uint64) (addr uint64, err error) {
	text, err := mem.qmp.HMP(ctx, fmt.Sprintf("gpa2hva %#x", physical))
	if err != nil {
		return 0, err
	}
	// The answer is "Host virtual address for 0x0 (pc.ram) is 0x7f..." (hmp_gpa2hva in QEMU's monitor). The name in it is
	// that of the memory region.
	_, at, found := strings.Cut(strings.TrimSpace(text), ") is 0x")
	if !found {
		return 0, nil
	}
	if _, err := fmt.Sscanf(at, "%x", &addr); err != nil {
		return 0, fmt.Errorf("QEMU's gpa2hva says %q: %w", text, err)
	}
	return addr, nil
}

// A memoryBackend is one of QEMU's memory-backend-* objects (Memdev in qapi/machine.json).
type memoryBackend struct {
	ID       string `json:"id"`
	Prealloc bool   `json:"prealloc"`
}

// memoryBackends returns QEMU's memory backends by ID.
func (mem *Memory) memoryBackends(ctx context.Context) (map[string]memoryBackend, error) {
	var list []memoryBackend
	if err := mem.qmp.Do(ctx, "query-memdev", nil, &list); err != nil {
		return nil, err
	}
	backends := make(map[string]memoryBackend, len(list))
	for _, b := range list {
		backends[b.ID] = b
	}
	return backends, nil
}

// locked reports whether QEMU keeps all of its memory locked (mlockall(2)).
func (mem *Memory) locked() (bool, error) {
	status, err := process.Status(mem.process.PID())
	if err != nil {
		return false, fmt.Errorf("locked memory of QEMU: %w", err)
	}
	return status["VmLck"] != "" && status["VmLck"] != "0 kB", nil
}

// locate describes what is mapped at the address of a listed block.
func (mem *Memory) locate(l listedBlock, maps process.Maps) (Block, error) {
	b := Block{ID: l.name, Size: l.used, PageSize: l.pageSize, Addr: l.addr, maxSize: l.max}
	found := covering(maps, l.addr, l.max)
	if found == nil {
		return b, fmt.Errorf("RAM %q: QEMU, process %d, has no single memory of %d bytes at %#x",
			b.ID, mem.process.PID(), l.max, l.addr)
	}
	first := found[0]
	b.Private, b.ReadOnly = !first.Shared, !first.Writable
	if first.Inode == 0 {
		return b, nil
	}
	b.File, b.FileOffset = first.Path, int64(first.Offset+l.addr-first.Start)
	var err error
	if b.Path, err = mem.openablePath(first); err != nil && !b.Private && !anonymous(first) {
		return b, fmt.Errorf("RAM %q: %w", b.ID, err)
	}
	fs, err := fileSystem(b.Path, first)
	if err != nil {
		return b, fmt.Errorf("RAM %q: %w", b.ID, err)
	}
	switch inMemory := fs == unix.TMPFS_MAGIC || fs == unix.HUGETLBFS_MAGIC; {
	case b.Private:
		b.behind = fs != unix.HUGETLBFS_MAGIC
	case !inMemory && !b.ReadOnly:
		return b, &Error{b.ID, fmt.Sprintf("QEMU writes it to the file %s, which is neither on tmpfs nor on hugetlbfs, "+
			"so userfaultfd cannot fill it", first.Path),
			"put its mem-path on /dev/shm or on a mount of hugetlbfs, or give its memory backend share=off"}
	default:
		b.FileIdentity = fmt.Sprintf("%s:%x:%x:%d", bootID(), first.Major, first.Minor, first.Inode)
		b.Present, err = b.presentInFile()
	}
	return b, err
}

// presentInFile returns how many bytes of the block's file exist. The result is at most the block's size, because one
// file may hold several blocks.
func (b *Block) presentInFile() (uint64, error) {
	if b.Path == "" { // shared and anonymous
		return 0, nil
	}
	var st unix.Stat_t
	if err := unix.Stat(b.Path, &st); err != nil {
		return 0, fmt.Errorf("RAM %q: %w", b.ID, err)
	}
	const statUnit = 512 // stat(2), st_blocks
	return min(b.Size, uint64(st.Blocks)*statUnit), nil
}

// fileSystem returns the type of the file system that a mapped file is on.
func fileSystem(path string, m process.Mapping) (int64, error) {
	if path == "" && anonymous(m) {
		return unix.TMPFS_MAGIC, nil
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		return 0, fmt.Errorf("file system of %s: %w", m.Path, err)
	}
	return fs.Type, nil
}

// bootID identifies this boot of this host (random(4)).
func bootID() string {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "unknown" // no /proc/sys in this container; device and inode still tell files of one host apart
	}
	return strings.TrimSpace(string(id))
}
