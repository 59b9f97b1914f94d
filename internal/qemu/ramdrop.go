// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/pagesrv/pagemap"
	"github.com/migrated-vm/migrated/pkg/uffd/inject"
)

// madvDontneedLocked is MADV_DONTNEED for memory that is locked, too (linux/mman.h, since Linux 5.18).
const madvDontneedLocked = 24

// DropRAM empties the memory of a destination: what QEMU put there when it started (firmware, flash, preallocated
// pages) is not the VM's, and a page that is there raises no fault. It must not be called once pages of the VM may have
// arrived.
//
// QEMU itself is made to do it, by system calls that its main thread runs for us, so that nothing is dropped but what
// this process has mapped: a file is never opened by its name, which may lead to another VM's. A file that others map
// as well is refused.
func (vm *VM) DropRAM(ctx context.Context, blocks []RAMBlock) error {
	if err := vm.CheckAlone(blocks); err != nil {
		return err
	}
	for _, b := range blocks {
		if err := checkContent(b); err != nil {
			return err
		}
	}
	return vm.inject(ctx, func(p *inject.Process) error {
		for _, b := range blocks {
			if b.ReadOnly {
				continue
			}
			if err := vm.dropBlock(ctx, p, b); err != nil {
				return fmt.Errorf("RAM %q: have QEMU drop what is in it: %w", b.ID, err)
			}
		}
		return nil
	})
}

// A RAMRange is a part of a block.
type RAMRange struct {
	Block        RAMBlock
	Offset, Size uint64 // bytes, whole pages
}

// DropRanges empties parts of memory that DropRAM has emptied before.
func (vm *VM) DropRanges(ctx context.Context, ranges []RAMRange) error {
	return vm.inject(ctx, func(p *inject.Process) error {
		for _, r := range ranges {
			if err := vm.drop(ctx, p, r.Block, r.Offset, r.Size); err != nil {
				return fmt.Errorf("RAM %q: have QEMU drop what is at %#x: %w", r.Block.ID, r.Offset, err)
			}
		}
		return nil
	})
}

// inject calls f with a hold on QEMU's main thread, for system calls.
func (vm *VM) inject(ctx context.Context, f func(p *inject.Process) error) (err error) {
	p, err := inject.Seize(ctx, vm.Pid)
	if err != nil {
		return fmt.Errorf("have QEMU drop what is in its memory: %w", err)
	}
	defer func() { err = errors.Join(err, p.Detach()) }()
	if err := vm.Alive(); err != nil { // the number might be another's
		return err
	}
	return f(p)
}

// dropBlock makes QEMU drop all of a block.
func (vm *VM) dropBlock(ctx context.Context, p *inject.Process, b RAMBlock) error {
	if b.Private && b.behind {
		// Of a file on a disk userfaultfd knows nothing; one on tmpfs may have content, which would be found in pages that
		// have not come. Nothing of the file is wanted: all content comes from the source.
		return vm.replace(ctx, p, b)
	}
	return vm.drop(ctx, p, b, 0, b.Size)
}

// drop makes QEMU drop a part of a block, behind which there is no file.
func (vm *VM) drop(ctx context.Context, p *inject.Process, b RAMBlock, offset, bytes uint64) error {
	start, size := uintptr(b.Addr+offset), uintptr(bytes)
	if b.Private {
		_, err := p.Syscall(ctx, unix.SYS_MADVISE, start, size, unix.MADV_DONTNEED)
		if errors.Is(err, unix.EINVAL) {
			_, err = p.Syscall(ctx, unix.SYS_MADVISE, start, size, madvDontneedLocked)
		}
		return err
	}
	fd, known := vm.descriptorOf(b)
	if !known {
		_, err := p.Syscall(ctx, unix.SYS_MADVISE, start, size, unix.MADV_REMOVE)
		return err
	}
	const mode = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	_, err := p.Syscall(ctx, unix.SYS_FALLOCATE, uintptr(fd), mode, uintptr(b.FileOffset)+uintptr(offset), size)
	return err
}

// replace puts memory without a file where a private mapping of one was, with the advice that QEMU gave for it.
func (vm *VM) replace(ctx context.Context, p *inject.Process, b RAMBlock) error {
	advice, err := vm.advice(b)
	if err != nil {
		return err
	}
	const protection = unix.PROT_READ | unix.PROT_WRITE
	const flags = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_FIXED | unix.MAP_NORESERVE
	start, size := uintptr(b.Addr), uintptr(b.maxSize)
	if _, err := p.Syscall(ctx, unix.SYS_MMAP, start, size, protection, flags, ^uintptr(0), 0); err != nil {
		return err
	}
	for _, a := range advice {
		if _, err := p.Syscall(ctx, unix.SYS_MADVISE, start, size, a); err != nil {
			return fmt.Errorf("madvise(2), advice %d: %w", a, err)
		}
	}
	return nil
}

// adviceOf are the flags of a mapping (VmFlags in proc_pid_smaps(5)) that madvise(2) sets.
var adviceOf = map[string]uintptr{
	"dc": unix.MADV_DONTFORK, "dd": unix.MADV_DONTDUMP, "hg": unix.MADV_HUGEPAGE, "nh": unix.MADV_NOHUGEPAGE,
	"mg": unix.MADV_MERGEABLE,
}

// advice reads what QEMU has told the kernel of a block's memory.
func (vm *VM) advice(b RAMBlock) (advice []uintptr, err error) {
	numa, err := os.ReadFile(fmt.Sprintf("/proc/%d/numa_maps", vm.Pid))
	if err == nil {
		for line := range strings.Lines(string(numa)) {
			fields := strings.Fields(line)
			if len(fields) > 1 && fields[0] == strconv.FormatUint(b.Addr, 16) && fields[1] != "default" {
				return nil, fmt.Errorf("it is bound to NUMA nodes (%s) and a private mapping of a file: "+
					"give its memory backend share=on, or bind it to no node", fields[1])
			}
		}
	}
	smaps, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", vm.Pid))
	if err != nil {
		return nil, err
	}
	_, rest, found := strings.Cut(string(smaps), fmt.Sprintf("\n%x-", b.Addr))
	_, rest, flagged := strings.Cut(rest, "VmFlags:")
	if !found || !flagged {
		return nil, fmt.Errorf("/proc/%d/smaps says nothing of the mapping at %#x", vm.Pid, b.Addr)
	}
	line, _, _ := strings.Cut(rest, "\n")
	for _, flag := range strings.Fields(line) {
		if a, known := adviceOf[flag]; known {
			advice = append(advice, a)
		}
	}
	return advice, nil
}

// descriptorOf returns the number that QEMU has for the file of a shared block.
func (vm *VM) descriptorOf(b RAMBlock) (fd int, known bool) {
	dir, name := filepath.Split(b.Path)
	if filepath.Base(dir) != "fd" {
		return 0, false
	}
	fd, err := strconv.Atoi(name)
	return fd, err == nil
}

// checkContent refuses a file with content that shows through a private mapping wherever a page is missing.
func checkContent(b RAMBlock) error {
	if !b.Private || b.ReadOnly || b.File == "" || b.behind {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Stat(b.Path, &st); err != nil {
		return fmt.Errorf("RAM %q: its file %s: %w", b.ID, b.File, err)
	}
	if st.Blocks != 0 {
		return &RAMError{b.ID, fmt.Sprintf("the file %s, which the destination QEMU maps privately (share=off), has content, "+
			"and the VM would find that in pages that have not come", b.File), "remove the file, or give its mem-path as a directory"}
	}
	return nil
}

// CheckEmpty says whether QEMU has touched a block since DropRAM: what is there would not be fetched.
func (vm *VM) CheckEmpty(blocks []RAMBlock) error {
	pages, err := pagemap.Open(vm.Pid)
	if err != nil {
		return err
	}
	defer pages.Close()
	for _, b := range blocks {
		if b.ReadOnly {
			continue
		}
		at, err := pages.Next(b.Addr, b.Addr+b.Size)
		if err != nil {
			return fmt.Errorf("RAM %q: %w", b.ID, err)
		}
		if at < b.Addr+b.Size {
			return fmt.Errorf("RAM %q: the destination QEMU, or who has it mapped, uses the page at %#x before the VM has come",
				b.ID, at-b.Addr)
		}
	}
	return nil
}
