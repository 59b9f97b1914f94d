// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/qmp"
)

// Backend is the kind of memory of a VM's RAM.
type Backend string

// The backends. Another process cannot read memory that is private to QEMU from a file; see [Host.SaveRAM].
const (
	// BackendFile is a shared file on /dev/shm, or on hugetlbfs. The empty Backend is this one.
	BackendFile Backend = "file"
	// BackendDefault is QEMU's default: private memory without a memory backend object, as most VMs have it. NUMA
	// nodes need such objects; with nodes, BackendDefault is the same as BackendRAM.
	BackendDefault Backend = "default"
	// BackendRAM is private memory of a memory backend object.
	BackendRAM Backend = "ram"
	// BackendRAMShared is shared memory without a file.
	BackendRAMShared Backend = "ram-shared"
	// BackendMemfd is a shared memfd, BackendMemfdPrivate one that is mapped copy-on-write.
	BackendMemfd        Backend = "memfd"
	BackendMemfdPrivate Backend = "memfd-private"
	// BackendFilePrivate is a file on /dev/shm, or on hugetlbfs, that is mapped copy-on-write.
	BackendFilePrivate Backend = "file-private"
	// BackendDiskPrivate is a sparse file on the machine's own disk, mapped copy-on-write; each host has its own.
	BackendDiskPrivate Backend = "ext4-private"
)

// Backends returns all backends.
func Backends() []Backend {
	return []Backend{
		BackendFile, BackendDefault, BackendRAM, BackendRAMShared, BackendMemfd, BackendMemfdPrivate,
		BackendFilePrivate, BackendDiskPrivate,
	}
}

// Huge reports whether the backend can have huge pages.
func (b Backend) Huge() bool {
	switch b {
	case "", BackendFile, BackendFilePrivate, BackendMemfd, BackendMemfdPrivate:
		return true
	default:
		return false
	}
}

// ramDir is the directory, on the host, of the files of the VM's RAM.
func (c VMConfig) ramDir() string {
	switch {
	case c.Backend == BackendDiskPrivate:
		return LocalDir
	case c.HugePages:
		return "/dev/hugepages"
	default:
		return "/dev/shm"
	}
}

// backend is the memory backend object for mib MiB of RAM.
func (c VMConfig) backend(id string, mib int) string {
	common := fmt.Sprintf("id=%s,size=%dM", id, mib)
	file := fmt.Sprintf("memory-backend-file,%s,mem-path=%s/guest-%s", common, c.ramDir(), id)
	memfd := "memory-backend-memfd," + common
	if c.HugePages {
		memfd += ",hugetlb=on,hugetlbsize=2M"
	}
	switch c.Backend {
	case BackendDefault, BackendRAM:
		return "memory-backend-ram," + common
	case BackendRAMShared:
		return "memory-backend-ram," + common + ",share=on"
	case BackendMemfd:
		return memfd + ",share=on"
	case BackendMemfdPrivate:
		return memfd + ",share=off"
	case BackendFilePrivate, BackendDiskPrivate:
		return file + ",share=off"
	default:
		return file + ",share=on"
	}
}

func (c VMConfig) memoryArgs() []string {
	if c.Nodes < 2 {
		if c.Backend == BackendDefault {
			return nil
		}
		return []string{"-object", c.backend("ram0", c.MemoryMiB), "-machine", "memory-backend=ram0"}
	}
	var args []string
	for i := range c.Nodes {
		id := fmt.Sprintf("ram%d", i)
		args = append(args, "-object", c.backend(id, c.MemoryMiB/c.Nodes),
			"-numa", fmt.Sprintf("node,nodeid=%d,memdev=%s", i, id))
	}
	return args
}

// RAMFiles returns the paths, on the host, of the files of the VM's RAM, low addresses first. It returns nil if what
// the guest writes is in no file.
func (c VMConfig) RAMFiles() []string {
	if c.Backend != "" && c.Backend != BackendFile {
		return nil
	}
	var files []string
	for i := range max(1, c.Nodes) {
		files = append(files, fmt.Sprintf("%s/guest-ram%d", c.ramDir(), i))
	}
	return files
}

// SavedRAM is a path for [Host.SaveRAM].
const SavedRAM = VMDir + "/ram.saved"

// SaveRAM has QEMU write the RAM of the VM to a file of the host, and returns the file's path outside of the host. The
// caller must have stopped the VM. SaveRAM works for every backend, but only up to 2 GiB, where RAM has no gap.
// The caller removes the file. The next SaveRAM writes it again.
func (h *Host) SaveRAM(ctx context.Context, client *qmp.Client, c VMConfig, saved string) (path string, err error) {
	path = h.Path(saved)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	all := map[string]any{"val": 0, "size": int64(c.MemoryMiB) << 20, "filename": saved}
	if err := client.Do(ctx, "pmemsave", all, nil); err != nil {
		return "", fmt.Errorf("save the RAM of the VM on host %s: %w", h.Name, err)
	}
	return path, nil
}

// Allocated returns the bytes of memory that a file of the host occupies.
func (h *Host) Allocated(path string) (int64, error) {
	var st unix.Stat_t
	if err := unix.Stat(filepath.Clean(h.Path(path)), &st); err != nil {
		return 0, fmt.Errorf("%s on host %s: %w", path, h.Name, err)
	}
	return st.Blocks * 512, nil
}

// MapFile maps a file with a VM's RAM into this process. The caller unmaps it.
func MapFile(path string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close() // the mapping stays
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size() == 0 {
		return nil, unix.ENODATA
	}
	return unix.Mmap(int(file.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
}
