// SPDX-License-Identifier: Apache-2.0

package ram

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/inject"
)

// madvDontneedLocked is MADV_DONTNEED that also works for locked memory (linux/mman.h, since Linux 5.18).
const madvDontneedLocked = 24

// Drop empties the memory of a destination. QEMU fills some of it when it starts (firmware, flash, preallocated pages).
// That content does not belong to the VM, and a page that exists raises no fault. Do not call Drop once pages of the VM
// may have arrived.
//
// QEMU's main thread runs the system calls on behalf of this process. Only what QEMU itself has mapped can be dropped
// that way: no file is opened by its name, which may lead to the memory of another VM. Drop refuses a file that other
// processes map as well, and a file in which khugepaged might fill the holes again.
func (mem *Memory) Drop(ctx context.Context, blocks []Block) error {
	if err := errors.Join(mem.CheckAlone(blocks), mem.checkHolesKept(blocks)); err != nil {
		return err
	}
	for _, b := range blocks {
		if err := checkContent(b); err != nil {
			return err
		}
	}
	return mem.inject(ctx, func(p *inject.Process) error {
		for _, b := range blocks {
			if b.ReadOnly {
				continue
			}
			if err := mem.dropBlock(ctx, p, b); err != nil {
				return fmt.Errorf("RAM %q: have QEMU drop what is in it: %w", b.ID, err)
			}
		}
		return nil
	})
}

// A Range is a part of a block.
type Range struct {
	Block        Block
	Offset, Size uint64 // bytes, whole pages
}

// DropRanges empties parts of memory that Drop has emptied before.
func (mem *Memory) DropRanges(ctx context.Context, ranges []Range) error {
	return mem.inject(ctx, func(p *inject.Process) error {
		for _, r := range ranges {
			if err := mem.drop(ctx, p, r.Block, r.Offset, r.Size); err != nil {
				return fmt.Errorf("RAM %q: have QEMU drop what is at %#x: %w", r.Block.ID, r.Offset, err)
			}
		}
		return nil
	})
}

// inject stops QEMU's main thread and calls f, which can run system calls in it.
func (mem *Memory) inject(ctx context.Context, f func(p *inject.Process) error) (err error) {
	p, err := inject.Seize(ctx, mem.process.PID())
	if err != nil {
		return fmt.Errorf("have QEMU drop what is in its memory: %w", err)
	}
	defer func() { err = errors.Join(err, p.Detach()) }()
	if err := mem.process.Alive(); err != nil { // the PID might belong to another process by now
		return err
	}
	return f(p)
}

// dropBlock makes QEMU drop a whole block.
func (mem *Memory) dropBlock(ctx context.Context, p *inject.Process, b Block) error {
	if b.Private && b.behind {
		// userfaultfd does not support a file on a disk. A file on tmpfs may have content, which would show in pages that
		// have not arrived. Nothing of the file is needed: all content comes from the source.
		return mem.replace(ctx, p, b)
	}
	return mem.drop(ctx, p, b, 0, b.Size)
}

// dropPiece is the number of bytes that one system call drops. It is a multiple of every page size. The kernel frees
// this much in a fraction of the time limit of an injected call; freeing all preallocated memory at once would take
// longer.
const dropPiece = 1 << 30

// drop makes QEMU drop a part of a block that has no file behind it.
func (mem *Memory) drop(ctx context.Context, p *inject.Process, b Block, offset, bytes uint64) error {
	for end := offset + bytes; offset < end; offset += dropPiece {
		if err := mem.dropOnce(ctx, p, b, offset, min(dropPiece, end-offset)); err != nil {
			return err
		}
	}
	return nil
}

// dropOnce drops a part of a block with a single system call.
func (mem *Memory) dropOnce(ctx context.Context, p *inject.Process, b Block, offset, bytes uint64) error {
	start, size := uintptr(b.Addr+offset), uintptr(bytes)
	if b.Private {
		_, err := p.Syscall(ctx, unix.SYS_MADVISE, start, size, unix.MADV_DONTNEED)
		if errors.Is(err, unix.EINVAL) {
			_, err = p.Syscall(ctx, unix.SYS_MADVISE, start, size, madvDontneedLocked)
		}
		return err
	}
	fd, known := mem.descriptorOf(b)
	if !known {
		_, err := p.Syscall(ctx, unix.SYS_MADVISE, start, size, unix.MADV_REMOVE)
		return err
	}
	const mode = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	_, err := p.Syscall(ctx, unix.SYS_FALLOCATE, uintptr(fd), mode, uintptr(b.FileOffset)+uintptr(offset), size)
	return err
}

// replace maps memory without a file in place of a private file mapping, with the same madvise flags.
func (mem *Memory) replace(ctx context.Context, p *inject.Process, b Block) error {
	advice, err := mem.advice(b)
	if err != nil {
		return err
	}
	if err := mem.drop(ctx, p, b, 0, b.Size); err != nil { // so that the new mapping frees nothing
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

// adviceOf maps the flags of a mapping (VmFlags in proc_pid_smaps(5)) to the madvise(2) advice that sets them.
var adviceOf = map[string]uintptr{
	"dc": unix.MADV_DONTFORK, "dd": unix.MADV_DONTDUMP, "hg": unix.MADV_HUGEPAGE, "nh": unix.MADV_NOHUGEPAGE,
	"mg": unix.MADV_MERGEABLE,
}

// advice returns the madvise(2) advice that QEMU gave for a block's memory.
func (mem *Memory) advice(b Block) (advice []uintptr, err error) {
	numa, err := os.ReadFile(fmt.Sprintf("/proc/%d/numa_maps", mem.process.PID()))
	if err == nil {
		for line := range strings.Lines(string(numa)) {
			fields := strings.Fields(line)
			if len(fields) > 1 && fields[0] == strconv.FormatUint(b.Addr, 16) && fields[1] != "default" {
				return nil, fmt.Errorf("it is bound to NUMA nodes (%s) and a private mapping of a file: "+
					"give its memory backend share=on, or bind it to no node", fields[1])
			}
		}
	}
	smaps, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", mem.process.PID()))
	if err != nil {
		return nil, err
	}
	_, rest, found := strings.Cut(string(smaps), fmt.Sprintf("\n%x-", b.Addr))
	_, rest, flagged := strings.Cut(rest, "VmFlags:")
	if !found || !flagged {
		return nil, fmt.Errorf("/proc/%d/smaps says nothing of the mapping at %#x", mem.process.PID(), b.Addr)
	}
	line, _, _ := strings.Cut(rest, "\n")
	for _, flag := range strings.Fields(line) {
		if a, known := adviceOf[flag]; known {
			advice = append(advice, a)
		}
	}
	return advice, nil
}

// descriptorOf returns the number of QEMU's own descriptor of a shared block's file, if known.
func (mem *Memory) descriptorOf(b Block) (fd int, known bool) {
	dir, name := filepath.Split(b.Path)
	if filepath.Base(dir) != "fd" {
		return 0, false
	}
	fd, err := strconv.Atoi(name)
	return fd, err == nil
}

// checkContent refuses a private mapping of a file with content, because that content would show in every missing page.
func checkContent(b Block) error {
	if !b.Private || b.ReadOnly || b.File == "" || b.behind {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Stat(b.Path, &st); err != nil {
		return fmt.Errorf("RAM %q: its file %s: %w", b.ID, b.File, err)
	}
	if st.Blocks != 0 {
		return &Error{b.ID, fmt.Sprintf("the file %s, which the destination QEMU maps privately (share=off), "+
			"has content, which the VM would see in pages that have not arrived", b.File),
			"remove the file, or give its mem-path as a directory"}
	}
	return nil
}

// CheckEmpty returns an error if a page of the blocks has been touched since Drop. The VM's content of such a page
// would not be fetched, because the page exists already.
func (mem *Memory) CheckEmpty(blocks []Block) error {
	pages, err := uffd.OpenPagemap(mem.process.PID())
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
			return fmt.Errorf("RAM %q: the destination QEMU, or another process, used the page at %#x before its content came",
				b.ID, at-b.Addr)
		}
	}
	return nil
}
