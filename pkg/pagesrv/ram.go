// SPDX-License-Identifier: Apache-2.0

package pagesrv

import (
	"errors"
	"fmt"
	"io"
	"math/bits"
	"os"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/pagewire"
)

// minPageSize is the smallest page of the architectures that are served, in bytes.
const minPageSize = 4096

// A Block is a piece of guest RAM that lies in a file. Its index in the list given to OpenRAM is the
// block number in page requests.
type Block struct {
	ID       string // QEMU's name of it, for messages
	Path     string // the RAM file, for example /proc/PID/map_files/A-B
	Offset   int64  // bytes from the beginning of the file
	Size     uint64 // bytes, a multiple of PageSize
	PageSize uint64 // bytes, a power of two from 4 KiB to 2 MiB
}

// RAM is the memory of one VM, open for reading. Close it after the export that serves it is withdrawn.
type RAM struct {
	blocks []openBlock
}

type openBlock struct {
	Block
	file *os.File
}

// OpenRAM opens the files of all blocks read-only and checks that they hold the blocks.
func OpenRAM(blocks []Block) (*RAM, error) {
	if len(blocks) == 0 {
		return nil, errors.New("open RAM: the VM has no RAM block")
	}
	ram := &RAM{}
	for _, b := range blocks {
		file, err := openBlockFile(b)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("open RAM block %q: %w", b.ID, err), ram.Close())
		}
		ram.blocks = append(ram.blocks, openBlock{b, file})
	}
	return ram, nil
}

func openBlockFile(b Block) (_ *os.File, err error) {
	switch {
	case b.PageSize < minPageSize || bits.OnesCount64(b.PageSize) != 1:
		return nil, fmt.Errorf("page size of %d bytes is no power of two of at least %d", b.PageSize, minPageSize)
	case b.PageSize > pagewire.MaxData:
		return nil, fmt.Errorf("pages of %d bytes are too large to be moved whole, use huge pages of at most %d bytes",
			b.PageSize, pagewire.MaxData)
	case b.Size == 0 || b.Size%b.PageSize != 0:
		return nil, fmt.Errorf("size of %d bytes is no multiple of the page size %d", b.Size, b.PageSize)
	case b.Offset < 0 || b.Size > 1<<62 || b.Offset > 1<<62:
		return nil, fmt.Errorf("%d bytes at offset %d are no part of a file", b.Size, b.Offset)
	}
	// O_NONBLOCK: a path that turns out to be a FIFO must not block here. Regular files ignore it.
	file, err := os.OpenFile(b.Path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err // names the path
	}
	defer func() {
		if err != nil {
			_ = file.Close()
		}
	}()
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no regular file (%v): RAM must be a memory-backend-file with share=on", b.Path, info.Mode().Type())
	}
	if end := b.Offset + int64(b.Size); info.Size() < end {
		return nil, fmt.Errorf("%s has %d bytes, the block ends at %d", b.Path, info.Size(), end)
	}
	return file, nil
}

// Close closes the files. A read that comes later fails.
func (r *RAM) Close() error {
	var errs []error
	for _, b := range r.blocks {
		errs = append(errs, b.file.Close())
	}
	return errors.Join(errs...)
}

// read fills dst from offset of the block.
func (b *openBlock) read(dst []byte, offset uint64) error {
	_, err := b.file.ReadAt(dst, b.Offset+int64(offset))
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("%s: the file was truncated below offset %d", b.Path, b.Offset+int64(offset)+int64(len(dst)))
	}
	return err // names the path
}

// hole returns where the next page with possible data begins, at offset or after it; at most Size. What
// lies before it was never written and reads as zero. hugetlbfs calls everything data.
//
// lseek(2) moves the position of the open file, which no read here uses.
func (b *openBlock) hole(offset uint64) (uint64, error) {
	at, err := b.file.Seek(b.Offset+int64(offset), unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) { // no data up to the end of the file
		return b.Size, nil
	}
	if err != nil {
		return 0, err
	}
	data := uint64(at-b.Offset) / b.PageSize * b.PageSize
	return min(max(data, offset), b.Size), nil
}
