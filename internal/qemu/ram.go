// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// RAMBlock is a piece of memory that belongs to the VM and where it is: guest RAM, and also firmware, video memory,
// flash and option ROMs. Everything but Addr and what is said of the file is the same at source and destination.
type RAMBlock struct {
	ID       string // QEMU's name of it (RAMBlock.idstr)
	Size     uint64 // bytes in use
	PageSize uint64 // bytes: the host's, or the huge page's

	Addr uint64 // of the first byte, in QEMU's address space
	// ReadOnly: QEMU itself cannot write to it, as to the image of a read-only nvdimm.
	ReadOnly bool
	// Populated: QEMU was told to have all of its memory from the beginning (prealloc=on, -overcommit mem-lock=on).
	Populated bool
	// HoldsFirstPage: it is what the guest has at address 0.
	HoldsFirstPage bool
	// Private: nobody but QEMU has this memory; it ends with QEMU.
	Private bool

	// File is what QEMU maps there, as it calls it; empty: no file.
	File string
	// Path leads to that file while QEMU lives, also when it has no name any more. It is empty where there is no file and
	// where it cannot be opened. What a private mapping holds is in the file only where QEMU has not written to it.
	Path       string
	FileOffset int64 // of the first byte, in the file
	// FileIdentity names the file of a shared mapping among all files of all hosts; empty for others.
	FileIdentity string
	// Present is how many bytes of that file are there, in memory or swapped out; 0 for others.
	Present uint64

	backend string // id of its -object memory-backend-*; empty: it has none
	maxSize uint64 // of the mapping
	behind  bool   // a private mapping of a file that is not on hugetlbfs, and shows through where QEMU has not written
}

// IsBackend says that it is an -object memory-backend-* of the user's, or the one that QEMU makes of -m.
func (b RAMBlock) IsBackend() bool { return b.backend != "" }

// RAMError says why memory of the VM cannot be moved.
type RAMError struct {
	ID     string // of the RAM block
	Reason string
	Remedy string
}

func (e *RAMError) Error() string { return fmt.Sprintf("RAM %q: %s; %s", e.ID, e.Reason, e.Remedy) }

// RAMBlocks returns all memory of the VM that QEMU's own migration would move, sorted by ID. What cannot be moved is a
// *RAMError each, joined.
func (vm *VM) RAMBlocks(ctx context.Context) ([]RAMBlock, error) {
	listed, err := vm.listBlocks(ctx)
	if err != nil {
		return nil, err
	}
	listed = slices.DeleteFunc(listed, func(b listedBlock) bool { return b.name == "" })
	slices.SortFunc(listed, func(a, b listedBlock) int { return cmp.Compare(a.name, b.name) })
	maps, err := readMaps(vm.Pid)
	if err != nil {
		return nil, err
	}
	if slices.ContainsFunc(listed, func(b listedBlock) bool { return b.addr == 0 }) {
		if err := vm.heap.find(vm.Pid, maps, listed); err != nil {
			return nil, err
		}
	}
	first, err := vm.firstPage(ctx, listed)
	if err != nil {
		return nil, err
	}
	backends, err := vm.memoryBackends(ctx)
	if err != nil {
		return nil, err
	}
	locked, err := vm.locked()
	if err != nil {
		return nil, err
	}
	var blocks []RAMBlock
	var failed []error
	for _, l := range listed {
		b, err := vm.locate(l, maps)
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

// firstPage returns where QEMU has the guest's address 0, which is RAM on each PC, and holds the list against that; 0:
// nothing is there.
func (vm *VM) firstPage(ctx context.Context, listed []listedBlock) (addr uint64, err error) {
	addr, err = vm.hostAddress(ctx, 0)
	if addr == 0 || err != nil { // another kind of machine, or a guest that has mapped something else there
		return 0, err
	}
	if !slices.ContainsFunc(listed, func(b listedBlock) bool { return addr >= b.addr && addr < b.addr+b.max }) {
		return 0, fmt.Errorf("QEMU has the guest's first page at %#x, where no RAM block was found", addr)
	}
	return addr, nil
}

// hostAddress returns where QEMU has a byte of guest memory, by its guest-physical address; 0: no RAM is there.
func (vm *VM) hostAddress(ctx context.Context, physical uint64) (addr uint64, err error) {
	text, err := vm.hmp(ctx, fmt.Sprintf("gpa2hva %#x", physical))
	if err != nil {
		return 0, err
	}
	// "Host virtual address for 0x0 (pc.ram) is 0x7f..." (hmp_gpa2hva in QEMU's monitor). The name is the memory region's.
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

// memoryBackends returns them by ID.
func (vm *VM) memoryBackends(ctx context.Context) (map[string]memoryBackend, error) {
	var list []memoryBackend
	if err := vm.QMP.Do(ctx, "query-memdev", nil, &list); err != nil {
		return nil, err
	}
	backends := make(map[string]memoryBackend, len(list))
	for _, b := range list {
		backends[b.ID] = b
	}
	return backends, nil
}

// locked tells whether QEMU keeps all of its memory locked (mlockall(2)).
func (vm *VM) locked() (bool, error) {
	status, err := readStatus(vm.Pid)
	if err != nil {
		return false, fmt.Errorf("locked memory of QEMU: %w", err)
	}
	return status["VmLck"] != "" && status["VmLck"] != "0 kB", nil
}

// property reads a property of a QOM object. One that does not exist is a qmp.ErrGeneric.
func (vm *VM) property(ctx context.Context, path, name string, value any) error {
	return vm.QMP.Do(ctx, "qom-get", map[string]string{"path": path, "property": name}, value)
}

// A memoryDevice is one of query-memory-devices.
type memoryDevice struct {
	Type string `json:"type"`
}

// virtioMem is the type of those whose size the guest changes.
const virtioMem = "virtio-mem"

func (vm *VM) memoryDevices(ctx context.Context) (devices []memoryDevice, err error) {
	err = vm.QMP.Do(ctx, "query-memory-devices", nil, &devices)
	return devices, err
}

// locate finds what is mapped at a block's address.
func (vm *VM) locate(l listedBlock, maps []vma) (RAMBlock, error) {
	b := RAMBlock{ID: l.name, Size: l.used, PageSize: l.pageSize, Addr: l.addr, maxSize: l.max}
	found := covering(maps, l.addr, l.max)
	if found == nil {
		return b, fmt.Errorf("RAM %q: QEMU, process %d, has no single memory of %d bytes at %#x", b.ID, vm.Pid, l.max, l.addr)
	}
	first := found[0]
	b.Private, b.ReadOnly = !first.shared, !first.writable
	if first.inode == 0 {
		return b, nil
	}
	b.File, b.FileOffset = first.path, int64(first.offset+l.addr-first.start)
	var err error
	if b.Path, err = vm.openablePath(first); err != nil && !b.Private && !anonymous(first) {
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
		return b, &RAMError{b.ID, fmt.Sprintf("QEMU writes it to the file %s, which is neither on tmpfs nor on hugetlbfs, "+
			"so userfaultfd cannot fill it", first.path), "put its mem-path on /dev/shm or on a mount of hugetlbfs, or give its memory backend share=off"}
	default:
		b.FileIdentity = fmt.Sprintf("%s:%x:%x:%d", bootID(), first.major, first.minor, first.inode)
		b.Present, err = b.presentInFile()
	}
	return b, err
}

// presentInFile is at most the block's size: one file may hold others, too.
func (b *RAMBlock) presentInFile() (uint64, error) {
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
func fileSystem(path string, m vma) (int64, error) {
	if path == "" && anonymous(m) {
		return unix.TMPFS_MAGIC, nil
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		return 0, fmt.Errorf("file system of %s: %w", m.path, err)
	}
	return fs.Type, nil
}

// bootID tells this boot of this host from all others (random(4)).
func bootID() string {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "unknown" // no /proc/sys in this container; device and inode still tell files of one host apart
	}
	return strings.TrimSpace(string(id))
}
