// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/cgroup"
	"github.com/migrated-vm/migrated/internal/qemu/ram"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// errNotOnHost says that this host has less memory to give than the VM uses already. The VM would stall, or be killed,
// when the last of it is taken.
var errNotOnHost = errors.New("the destination does not have enough memory")

// A hostCapacity reports how much memory a host has to give, in bytes.
type hostCapacity struct {
	// memory returns how much memory of small pages is available, swap included.
	memory func() (uint64, error)
	// hugePages returns the memory in huge pages of that size. free counts free pages and pages that the kernel may
	// still make on demand. promised is the part of free that is reserved for processes that have mapped it.
	hugePages func(size uint64) (free, promised uint64, err error)
}

// thisHost asks the kernel.
var thisHost = hostCapacity{memory: memoryAndSwap, hugePages: hugePagesOf}

// memoryAndSwap returns the sum of MemAvailable and SwapFree of proc_meminfo(5), in bytes.
func memoryAndSwap() (uint64, error) {
	memory, err := meminfo("MemAvailable")
	if err != nil {
		return 0, err
	}
	swap, err := meminfo("SwapFree")
	return memory + swap, err
}

// hugePagesOf reads the counters that Documentation/admin-guide/mm/hugetlbpage.rst describes. Units: bytes.
func hugePagesOf(size uint64) (free, promised uint64, err error) {
	dir := fmt.Sprintf("/sys/kernel/mm/hugepages/hugepages-%dkB", size>>10)
	counts := make(map[string]uint64)
	for _, name := range []string{"free_hugepages", "resv_hugepages", "nr_overcommit_hugepages", "surplus_hugepages"} {
		text, err := os.ReadFile(filepath.Join(dir, name))
		if err == nil {
			counts[name], err = strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
		}
		if err != nil {
			return 0, 0, fmt.Errorf("huge pages: %w", err)
		}
	}
	more := counts["nr_overcommit_hugepages"] - min(counts["nr_overcommit_hugepages"], counts["surplus_hugepages"])
	return (counts["free_hugepages"] + more) * size, counts["resv_hugepages"] * size, nil
}

// MemoryOf returns how much memory a VM may take of a host (size), and how much of it the VM uses already (held). Both
// are in bytes, by page size, and include what its QEMU needs besides the VM's memory.
func MemoryOf(machine *migratedv1.SourceMachine) (size, held map[uint64]uint64) {
	small := uint64(os.Getpagesize())
	size, held = map[uint64]uint64{small: qemuNeeds}, map[uint64]uint64{small: qemuNeeds + machine.GetPrivateMemory()}
	for _, b := range machine.GetRamBlocks() {
		pages := max(b.GetPageSize(), small)
		size[pages] += b.GetSize()
		if pages == small {
			held[pages] += b.GetPresent()
		} else {
			held[pages] += b.GetSize() // QEMU reserves all of its huge pages when it starts
		}
	}
	return size, held
}

// HostRoom returns how much memory this host has to give to VMs whose QEMUs start in the control group. An empty group
// means the control group of this process.
func HostRoom(group string) (*migratedv1.HostRoom, error) {
	memory, err := meminfo("MemAvailable")
	if err != nil {
		return nil, err
	}
	swap, err := meminfo("SwapFree")
	if err != nil {
		return nil, err
	}
	least, limited, err := memoryLimitOf(group)
	if err != nil {
		return nil, err
	}
	if limited {
		memory = min(memory, least.Left())
	}
	room := &migratedv1.HostRoom{Memory: memory, Swap: swap}
	for _, size := range hugePageSizes() {
		free, promised, err := hugePagesOf(size)
		if err != nil {
			return nil, err
		}
		room.HugePages = append(room.HugePages, &migratedv1.HugePages{PageSize: size, Free: free - min(free, promised)})
	}
	return room, nil
}

// memoryLimitOf returns the memory limit of the control group, or of one of its parents, that leaves the least; false:
// there is no limit. An empty group means the control group of this process.
func memoryLimitOf(group string) (cgroup.Limit, bool, error) {
	groups, err := groupsOf(group)
	if err != nil {
		return cgroup.Limit{}, false, err
	}
	return groups.Least(cgroup.Memory)
}

// hugePageSizes returns the sizes of huge pages that the kernel supports, in bytes.
func hugePageSizes() (sizes []uint64) {
	dirs, _ := filepath.Glob("/sys/kernel/mm/hugepages/hugepages-*kB") // the pattern is well-formed
	for _, dir := range dirs {
		var kib uint64
		if _, err := fmt.Sscanf(filepath.Base(dir), "hugepages-%dkB", &kib); err == nil {
			sizes = append(sizes, kib<<10)
		}
	}
	return sizes
}

// checkFits refuses a VM that uses more memory than this host has to give. Call it after the VM's memory was emptied
// here. The VM's full size may be larger than that: it may never need memory that it does not use now.
func (h hostCapacity) checkFits(machine *migratedv1.SourceMachine, blocks []ram.Block) error {
	present := make(map[string]uint64, len(machine.GetRamBlocks()))
	small, huge, hugeSize := machine.GetPrivateMemory(), uint64(0), uint64(0)
	for _, b := range machine.GetRamBlocks() {
		if b.GetPageSize() <= uint64(os.Getpagesize()) {
			small += b.GetPresent()
		} else {
			huge, hugeSize = huge+b.GetSize(), b.GetPageSize()
		}
		present[b.GetId()] = b.GetPresent()
		if b.GetFile() == "" {
			present[b.GetId()] = min(b.GetSize(), machine.GetPrivateMemory())
		}
	}
	has, err := h.memory()
	if err != nil {
		return err
	}
	if has < small {
		return noRoomError("", small, "of memory and swap are available", has,
			"free memory at the destination, or move the VM to another host")
	}
	if huge = min(huge, machine.GetHugeMemory()); huge != 0 {
		free, _, err := h.hugePages(hugeSize)
		if err != nil {
			return err
		}
		if free < huge {
			return noRoomError(" of huge pages", huge, "are free", free, remedyOfHugePages(hugeSize))
		}
	}
	return checkFileSystems(blocks, present)
}

// checkFileSystems refuses a VM whose RAM files do not fit on their file systems: a tmpfs has a size limit. present is
// how much of each block is used, in bytes, by the block's id.
func checkFileSystems(blocks []ram.Block, present map[string]uint64) error {
	type need struct {
		bytes, left uint64
		file        string
	}
	needs := make(map[unix.Fsid]need)
	for _, b := range blocks {
		if b.FileIdentity == "" || b.Path == "" {
			continue
		}
		var fs unix.Statfs_t
		if err := unix.Statfs(b.Path, &fs); err != nil {
			return fmt.Errorf("file system of %s: %w", b.File, err)
		}
		if fs.Type != unix.TMPFS_MAGIC || fs.Blocks == 0 { // the kernel's internal tmpfs, which holds memfds, has no limit
			continue
		}
		n := needs[fs.Fsid]
		needs[fs.Fsid] = need{n.bytes + present[b.ID], fs.Bavail * uint64(fs.Bsize), b.File}
	}
	for _, n := range needs {
		if n.left < n.bytes {
			return noRoomError("", n.bytes, "are left on the file system of "+n.file, n.left,
				"remove files from that tmpfs, or enlarge it (mount -o remount,size=)")
		}
	}
	return nil
}

// noRoomError returns the error that says how much is needed and how much there is. Units: bytes.
func noRoomError(of string, needs uint64, are string, has uint64, remedy string) error {
	return withRemedy(
		fmt.Errorf("%w: the VM uses %d MiB%s, and %d MiB %s", errNotOnHost, needs>>20, of, has>>20, are), remedy)
}

func remedyOfHugePages(size uint64) string {
	return fmt.Sprintf(
		"raise /sys/kernel/mm/hugepages/hugepages-%dkB/nr_hugepages at the destination, or end what uses them", size>>10)
}

// explainFailedStart adds to failure, the error of a QEMU that did not start, that this host has too few huge pages,
// where that is the case. QEMU reserves all of its huge pages when it maps its memory, and on failure says only that it
// cannot allocate memory.
func (h hostCapacity) explainFailedStart(failure error, machine *migratedv1.SourceMachine) error {
	needs := make(map[uint64]uint64)
	for _, b := range machine.GetRamBlocks() {
		if b.GetPageSize() > uint64(os.Getpagesize()) {
			needs[b.GetPageSize()] += b.GetSize()
		}
	}
	for size, bytes := range needs {
		free, promised, err := h.hugePages(size)
		if left := free - min(free, promised); err == nil && left < bytes {
			return withRemedy(
				fmt.Errorf("%w: it needs %d MiB of huge pages, and %d MiB are free and not promised to others",
					failure, bytes>>20, left>>20), remedyOfHugePages(size))
		}
	}
	return failure
}
