// SPDX-License-Identifier: Apache-2.0

package pagesrv

import (
	"errors"
	"fmt"
	"io"
	"math/bits"
	"os"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/pagewire"
	"github.com/migrated-vm/migrated/pkg/uffd"
)

// minPageSize is the smallest page of the architectures that are served, in bytes.
const minPageSize = 4096

// LargestPage is the size of the largest pages that are served whole, in bytes. Larger pages are served in parts of
// that size.
const LargestPage = pagewire.MaxData

// Block is a piece of memory of a VM. Its index in the list given to OpenRAM is the block number in page
// requests.
//
// All of it is in a file that the VM shares (Path and Offset alone), or in memory of a process (PID and Addr). If the
// process has the memory from a file that it does not write to (a private mapping), Path and Offset say which;
// otherwise there is no Path.
type Block struct {
	ID       string // QEMU's name of it, for messages
	Size     uint64 // bytes, a multiple of PageSize
	PageSize uint64 // bytes, a power of two from 4 KiB to 2 MiB

	Path   string // the file, for example /proc/PID/map_files/A-B
	Offset int64  // bytes from the beginning of the file

	PID  int    // the process; 0: the file has all
	Addr uint64 // of the first byte in the process
	// Shared says that other processes may have the memory, too. Then pages that the process has not mapped may still have
	// content.
	Shared bool
}

// RAM is the memory of one VM, open for reading. Close it after the export that serves it is withdrawn.
//
// It refers to the files and to the memory of the process as they were when it was opened. If the process ends and
// another one gets its number, that other one is never read.
type RAM struct {
	blocks []openBlock
	opened []io.Closer
}

// openBlock reads from file, in which the block begins at base.
type openBlock struct {
	Block
	file *os.File
	base int64

	pages *uffd.Pagemap // of a process' private memory, else nil
	under *os.File      // has the content where pages has none; nil: zeros
}

// ErrProcessGone says that the process whose memory was to be read has ended.
var ErrProcessGone = errors.New("QEMU has ended, and with it the VM's memory that only it had")

// OpenRAM opens the files and the memory of all blocks read-only and checks that they hold the blocks.
func OpenRAM(blocks []Block) (*RAM, error) {
	if len(blocks) == 0 {
		return nil, errors.New("open RAM: the VM has no RAM block")
	}
	ram := &RAM{}
	processes := map[int]process{}
	for _, b := range blocks {
		open, err := ram.open(b, processes)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("open RAM block %q: %w", b.ID, err), ram.Close())
		}
		ram.blocks = append(ram.blocks, open)
	}
	return ram, nil
}

// process refers to a process whose memory is read.
type process struct {
	memory *os.File
	pages  *uffd.Pagemap
}

func (r *RAM) open(b Block, processes map[int]process) (open openBlock, err error) {
	if err := check(b); err != nil {
		return open, err
	}
	open = openBlock{Block: b, base: b.Offset}
	if b.PID == 0 {
		open.file, err = r.openFile(b)
		return open, err
	}
	p, known := processes[b.PID]
	if !known {
		if p, err = r.openProcess(b.PID); err != nil {
			return open, err
		}
		processes[b.PID] = p
	}
	open.file, open.base = p.memory, int64(b.Addr)
	if b.Shared {
		return open, nil
	}
	open.pages = p.pages
	if b.Path != "" {
		open.under, err = r.openFile(b)
	}
	return open, err
}

func (r *RAM) openProcess(pid int) (p process, err error) {
	if p.memory, err = os.Open(fmt.Sprintf("/proc/%d/mem", pid)); err != nil {
		return p, err
	}
	r.opened = append(r.opened, p.memory)
	if p.pages, err = uffd.OpenPagemap(pid); err != nil {
		return p, err
	}
	r.opened = append(r.opened, p.pages)
	return p, nil
}

func check(b Block) error {
	switch {
	case b.PageSize < minPageSize || bits.OnesCount64(b.PageSize) != 1:
		return fmt.Errorf("page size of %d bytes is no power of two of at least %d", b.PageSize, minPageSize)
	case b.PageSize > LargestPage:
		return fmt.Errorf("pages of %d bytes are too large to be served whole, LargestPage is %d", b.PageSize, LargestPage)
	case b.Size == 0 || b.Size%b.PageSize != 0:
		return fmt.Errorf("size of %d bytes is no multiple of the page size %d", b.Size, b.PageSize)
	case b.Offset < 0 || b.Size > 1<<62 || b.Offset > 1<<62 || b.Addr > 1<<62:
		return fmt.Errorf("%d bytes at offset %d are no part of a file", b.Size, b.Offset)
	}
	return nil
}

func (r *RAM) openFile(b Block) (*os.File, error) {
	// O_NONBLOCK: a path that turns out to be a FIFO must not block here. Regular files ignore it.
	file, err := os.OpenFile(b.Path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err // names the path
	}
	r.opened = append(r.opened, file)
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no regular file (%v): the VM's memory cannot be in it", b.Path, info.Mode().Type())
	}
	if end := b.Offset + int64(b.Size); info.Size() < end {
		return nil, fmt.Errorf("%s has %d bytes, the block ends at %d", b.Path, info.Size(), end)
	}
	return file, nil
}

// Close closes the files. A read that comes later fails.
func (r *RAM) Close() error {
	var errs []error
	for _, c := range r.opened {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

// Read fills dst with what a block has from offset on, now.
func (r *RAM) Read(block int, offset uint64, dst []byte) error {
	if block >= len(r.blocks) {
		return fmt.Errorf("there is no RAM block %d", block)
	}
	b := &r.blocks[block]
	if n := uint64(len(dst)); offset > b.Size || n > b.Size-offset {
		return fmt.Errorf("RAM block %q: %d bytes at %#x, it has %d", b.ID, n, offset, b.Size)
	}
	return b.read(dst, offset)
}

// read fills dst from offset of the block.
func (b *openBlock) read(dst []byte, offset uint64) error {
	_, err := b.file.ReadAt(dst, b.base+int64(offset))
	switch {
	case errors.Is(err, io.EOF) && b.PID != 0: // EOF of /proc/PID/mem: the address space is gone
		return ErrProcessGone
	case errors.Is(err, io.EOF):
		return b.truncated(b.base + int64(offset) + int64(len(dst)))
	}
	return err // names the path
}

// truncated returns the error for a file that ends before a place at which the block has memory.
func (b *openBlock) truncated(below int64) error {
	return fmt.Errorf("%s: the file was truncated below offset %d", b.Path, below)
}

// holeReach is how far a hole of private memory is followed at a time, in bytes. Withdraw waits for the search. Without
// PAGEMAP_SCAN (Linux 6.7) the search reads 8 bytes for each page, which takes some 10 ms.
const holeReach = 8 << 30

// hole returns where the next page with possible data begins, at offset or after it. It returns at most Size. Where it
// looks no further, it returns the end of what is known to be a hole. The memory before that was never written and
// reads as zero.
func (b *openBlock) hole(offset uint64) (uint64, error) {
	if b.PID == 0 {
		return b.fileHole(b.file, offset)
	}
	if b.pages == nil {
		return offset, nil
	}
	start := uint64(b.base)
	at, err := b.pages.Next(start+offset, start+min(b.Size, offset+holeReach))
	if err != nil {
		return 0, gone(err)
	}
	data := max((at-start)/b.PageSize*b.PageSize, offset)
	if data > offset {
		if err := b.confirm(offset); err != nil {
			return 0, err
		}
	}
	if b.under == nil || data == offset {
		return data, nil
	}
	shown, err := b.fileHole(b.under, offset)
	return min(data, shown), err
}

// confirm checks that a hole that the map reported at offset is one. It is not if the process was dying: when Linux
// kills a process for want of memory, it takes the memory while the process still exists (oom_reaper in mm/oom_kill.c),
// and older versions of PAGEMAP_SCAN look into memory that is being taken down. In both cases pages that are missing
// cannot be read from then on, so one read tells. A huge page is not read, because the read might make it; the kernel
// takes huge pages last.
func (b *openBlock) confirm(offset uint64) error {
	if b.PageSize > minPageSize {
		return gone(b.pages.Exists(uint64(b.base) + offset))
	}
	var one [1]byte
	return b.read(one[:], offset)
}

// gone turns ESRCH into ErrProcessGone.
func gone(err error) error {
	if errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("%w: %w", ErrProcessGone, err)
	}
	return err
}

// fileHole looks for a hole in a file. hugetlbfs calls everything data.
//
// lseek(2) moves the position of the open file, which no read here uses.
func (b *openBlock) fileHole(file *os.File, offset uint64) (uint64, error) {
	at, err := file.Seek(b.Offset+int64(offset), unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) { // no data up to the end of the file, which may have been truncated
		info, err := file.Stat()
		if end := b.Offset + int64(b.Size); err == nil && info.Size() < end {
			err = b.truncated(end)
		}
		return b.Size, err
	}
	if err != nil {
		return 0, err
	}
	data := uint64(at-b.Offset) / b.PageSize * b.PageSize
	return min(max(data, offset), b.Size), nil
}
