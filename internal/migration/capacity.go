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

	"github.com/migrated-vm/migrated/internal/qemu"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// errNotOnHost says that this host has less to give than the VM holds already: it would stand still, or end, when the
// last of it is taken.
var errNotOnHost = errors.New("this host has no room for what the VM holds")

// A host says what it has to give, in bytes.
type host struct {
	// memory is that of small pages, with what can be swapped out.
	memory func() (uint64, error)
	// hugePages is that of huge pages of a size: free ones, and those that may be made on demand. promised are those of
	// them that are set aside for who has mapped them.
	hugePages func(size uint64) (free, promised uint64, err error)
}

// thisHost asks the kernel.
var thisHost = host{memory: memoryAndSwap, hugePages: hugePagesOf}

// memoryAndSwap is MemAvailable and SwapFree of proc_meminfo(5).
func memoryAndSwap() (uint64, error) {
	memory, err := meminfo("MemAvailable")
	if err != nil {
		return 0, err
	}
	swap, err := meminfo("SwapFree")
	return memory + swap, err
}

// hugePagesOf reads Documentation/admin-guide/mm/hugetlbpage.rst's files.
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

// checkHolds refuses a VM that holds more than this host can give to its memory, which has been emptied here. A VM may
// be larger than that: what it does not hold, it may never need.
func (h host) checkHolds(machine *migratedv1.SourceMachine, blocks []qemu.RAMBlock) error {
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
		return noRoom("", small, "of memory and swap are available", has,
			"free memory at the destination, or move the VM to another host")
	}
	if huge = min(huge, machine.GetHugeMemory()); huge != 0 {
		free, _, err := h.hugePages(hugeSize)
		if err != nil {
			return err
		}
		if free < huge {
			return noRoom(" of huge pages", huge, "are free", free, remedyOfHugePages(hugeSize))
		}
	}
	return checkFileSystems(blocks, present)
}

// checkFileSystems refuses what the file systems of the blocks' files have no room for: a tmpfs has a size.
func checkFileSystems(blocks []qemu.RAMBlock, present map[string]uint64) error {
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
		if fs.Type != unix.TMPFS_MAGIC || fs.Blocks == 0 { // the kernel's own, of memfds, has no limit
			continue
		}
		n := needs[fs.Fsid]
		needs[fs.Fsid] = need{n.bytes + present[b.ID], fs.Bavail * uint64(fs.Bsize), b.File}
	}
	for _, n := range needs {
		if n.left < n.bytes {
			return noRoom("", n.bytes, "are left on the file system of "+n.file, n.left,
				"remove what it is full of, or give it more (mount -o remount,size=)")
		}
	}
	return nil
}

// noRoom says what is needed and what there is, bytes.
func noRoom(of string, needs uint64, are string, has uint64, remedy string) error {
	return withRemedy(
		fmt.Errorf("%w: it holds %d MiB%s, and %d MiB %s", errNotOnHost, needs>>20, of, has>>20, are), remedy)
}

func remedyOfHugePages(size uint64) string {
	return fmt.Sprintf(
		"raise /sys/kernel/mm/hugepages/hugepages-%dkB/nr_hugepages at the destination, or end what has them", size>>10)
}

// explainStart adds to the failure of a QEMU's start that this host has too few huge pages for it, where that is so: a
// QEMU has them promised, all of them, when it maps its memory, and says only that it cannot allocate.
func (h host) explainStart(failure error, machine *migratedv1.SourceMachine) error {
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
