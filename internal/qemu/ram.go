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

	"github.com/migrated-vm/migrated/internal/qmp"
)

// RAMBlock is one memory backend of the guest and where it is. Everything but Addr and the paths is the same
// at source and destination.
type RAMBlock struct {
	ID       string // of QEMU's -object
	Size     uint64 // bytes
	PageSize uint64 // bytes: the host's, or the huge page's of hugetlbfs

	Addr       uint64 // of the first byte, in QEMU's address space
	FileOffset int64  // of the first byte, in its file
	// Path can be opened while QEMU lives, also when the file has no name any more.
	Path    string
	MemPath string // what QEMU was told: a file or a directory
	// FileIdentity names the file among all files of all hosts.
	FileIdentity string
}

// RAMError says why RAM of the guest cannot be moved.
type RAMError struct {
	ID     string // of the memory backend
	Reason string
	Remedy string
}

func (e *RAMError) Error() string { return fmt.Sprintf("RAM %q: %s; %s", e.ID, e.Reason, e.Remedy) }

// useBackend is how RAM is given to QEMU so that it can be moved.
const useBackend = "start the VM with -object memory-backend-file,id=ram0,size=...,mem-path=/dev/shm/...,share=on " +
	"-machine memory-backend=ram0"

// RAMBlocks returns all RAM of the guest, sorted by ID. RAM that cannot be moved is a *RAMError each, joined.
func (vm *VM) RAMBlocks(ctx context.Context) ([]RAMBlock, error) {
	backends, err := vm.memoryBackends(ctx)
	if err != nil {
		return nil, err
	}
	maps, err := readMaps(vm.Pid)
	if err != nil {
		return nil, err
	}
	var blocks []RAMBlock
	var failed []error
	for _, b := range backends {
		if err := b.movable(vm.QMP.Version()); err != nil {
			failed = append(failed, err)
			continue
		}
		block, err := vm.locate(b, maps)
		if err != nil {
			failed = append(failed, err)
			continue
		}
		blocks = append(blocks, block)
	}
	plugged, err := vm.pluggedMemory(ctx)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(append(failed, plugged...)...); err != nil {
		return nil, err
	}
	return blocks, nil
}

// A memoryBackend is one of QEMU's memory-backend-* objects (qapi/qom.json).
type memoryBackend struct {
	ID    string `json:"id"`
	Size  uint64 `json:"size"`
	Share bool   `json:"share"`

	kind    string // "memory-backend-file", ...
	memPath string
	offset  uint64 // in the file; QEMU >= 8.1 has the property
}

func (vm *VM) memoryBackends(ctx context.Context) ([]memoryBackend, error) {
	var backends []memoryBackend
	if err := vm.QMP.Do(ctx, "query-memdev", nil, &backends); err != nil {
		return nil, err
	}
	slices.SortFunc(backends, func(a, b memoryBackend) int { return cmp.Compare(a.ID, b.ID) })
	for i := range backends {
		b := &backends[i]
		path := "/objects/" + b.ID
		if err := vm.property(ctx, path, "type", &b.kind); err != nil {
			return nil, err
		}
		if b.kind != "memory-backend-file" {
			continue
		}
		if err := vm.property(ctx, path, "mem-path", &b.memPath); err != nil {
			return nil, err
		}
		if err := vm.property(ctx, path, "offset", &b.offset); err != nil && !errors.Is(err, qmp.ErrGeneric) {
			return nil, err
		}
	}
	return backends, nil
}

// property reads a property of a QOM object. One that does not exist is a qmp.ErrGeneric.
func (vm *VM) property(ctx context.Context, path, name string, value any) error {
	return vm.QMP.Do(ctx, "qom-get", map[string]string{"path": path, "property": name}, value)
}

// movable says, from what QEMU tells, whether x-ignore-shared leaves the backend out of QEMU's own stream
// and we can read and fill it instead.
func (b memoryBackend) movable(v qmp.Version) error {
	switch {
	case b.kind == "memory-backend-memfd" && (v.Major > 8 || v.Major == 8 && v.Minor > 0):
		return &RAMError{b.ID, "it is a memory-backend-memfd, which QEMU newer than 8.0 sends through its own stream " +
			"even with x-ignore-shared (QEMU up to 8.0 takes any shared memory)", useBackend}
	case b.kind != "memory-backend-file" && b.kind != "memory-backend-memfd":
		return &RAMError{b.ID, "it is a " + b.kind + ", private to QEMU", useBackend}
	case !b.Share:
		return &RAMError{b.ID, "it is private to QEMU (share=off)", "add share=on to its -object " + b.kind}
	}
	return nil
}

// A memoryDevice is one of query-memory-devices.
type memoryDevice struct {
	Type string `json:"type"`
	Data struct {
		ID         string `json:"id"`
		Memdev     string `json:"memdev"`
		Hotplugged bool   `json:"hotplugged"`
	} `json:"data"`
}

// virtioMem is the type of those whose size the guest changes.
const virtioMem = "virtio-mem"

func (vm *VM) memoryDevices(ctx context.Context) (devices []memoryDevice, err error) {
	err = vm.QMP.Do(ctx, "query-memory-devices", nil, &devices)
	return devices, err
}

// pluggedMemory finds memory that is not on QEMU's command line, so that a destination would lack it.
func (vm *VM) pluggedMemory(ctx context.Context) (failed []error, err error) {
	devices, err := vm.memoryDevices(ctx)
	for _, d := range devices {
		// How large a virtio-mem device is, is part of its state.
		if d.Data.Hotplugged {
			failed = append(failed, &RAMError{strings.TrimPrefix(d.Data.Memdev, "/objects/"),
				fmt.Sprintf("its %s device %q was plugged in while the VM ran, so QEMU's command line lacks it", d.Type, d.Data.ID),
				"unplug it, or restart the VM with that memory on its command line"})
		}
	}
	return failed, err
}

// locate finds a backend in QEMU's address space and its file.
func (vm *VM) locate(b memoryBackend, maps []vma) (RAMBlock, error) {
	found, err := vm.mappingsOf(b, maps)
	if err != nil {
		return RAMBlock{}, &RAMError{b.ID, err.Error(), useBackend}
	}
	first := found[0]
	block := RAMBlock{
		ID: b.ID, Size: b.Size, Addr: first.start, FileOffset: int64(first.offset), MemPath: b.memPath,
		FileIdentity: fmt.Sprintf("%s:%x:%x:%d", bootID(), first.major, first.minor, first.inode),
	}
	if block.Path, err = vm.openablePath(first); err != nil {
		return RAMBlock{}, fmt.Errorf("RAM %q: %w", b.ID, err)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(block.Path, &fs); err != nil {
		return RAMBlock{}, fmt.Errorf("RAM %q: file system of %s: %w", b.ID, block.Path, err)
	}
	switch fs.Type {
	case unix.TMPFS_MAGIC:
		block.PageSize = uint64(os.Getpagesize())
	case unix.HUGETLBFS_MAGIC:
		block.PageSize = uint64(fs.Bsize)
	default:
		return RAMBlock{}, &RAMError{b.ID, fmt.Sprintf("its file %s is neither on tmpfs nor on hugetlbfs, so userfaultfd cannot fill it", first.path),
			"put its mem-path on /dev/shm or on a mount of hugetlbfs"}
	}
	return block, nil
}

// bootID tells this boot of this host from all others (random(4)).
func bootID() string {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "unknown" // no /proc/sys in this container; device and inode still tell files of one host apart
	}
	return strings.TrimSpace(string(id))
}
