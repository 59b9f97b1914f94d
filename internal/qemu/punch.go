// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// PunchRAM empties the file of a destination's RAM block. Whatever is in it before the VM has come is junk,
// such as what prealloc=on or an earlier VM left there, and a page that is there raises no fault.
//
// It must not be called once pages of the VM may have arrived.
func PunchRAM(b RAMBlock) error {
	f, err := os.OpenFile(b.Path, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("RAM %q: %w", b.ID, err)
	}
	defer f.Close()
	fd := int(f.Fd())
	st, err := fstat(fd)
	if err != nil || st.Blocks == 0 {
		return err
	}
	const mode = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	if err := unix.Fallocate(fd, mode, b.FileOffset, int64(b.Size)); err != nil {
		return fmt.Errorf("RAM %q: punch a hole into %s: %w", b.ID, b.Path, err)
	}
	if st, err = fstat(fd); err != nil {
		return err
	}
	// Not SEEK_DATA: on hugetlbfs it calls everything data. Where another block has a part of the same
	// file, the count of blocks says nothing about ours.
	if whole := b.FileOffset == 0 && st.Size == int64(b.Size); whole && st.Blocks != 0 {
		return fmt.Errorf("RAM %q: %s has %d bytes of content right after it was emptied: another process writes to it",
			b.ID, b.Path, st.Blocks*512)
	}
	return nil
}

func fstat(fd int) (unix.Stat_t, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return st, fmt.Errorf("RAM file: %w", err)
	}
	return st, nil
}
