// SPDX-License-Identifier: Apache-2.0

package ram

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/qemu/process"
)

// OpenFile opens the file that a QEMU has mapped, shared and writable, at addr. It duplicates QEMU's own descriptor, so
// the file's name and permissions do not matter. offset is the position of addr in the file. f is nil if the mapping is
// private, or if QEMU has no writable descriptor of the file. OpenFile sends no command to QEMU. The caller closes f.
func OpenFile(qemu process.Identity, addr uint64) (f *os.File, offset int64, err error) {
	maps, err := process.ReadMaps(qemu.PID)
	if err != nil {
		return nil, 0, err
	}
	m, found := maps.At(addr)
	if !found {
		return nil, 0, fmt.Errorf("QEMU, process %d, has nothing mapped at %#x", qemu.PID, addr)
	}
	if !m.Shared || !m.Writable || m.Inode == 0 {
		return nil, 0, nil
	}
	h, err := process.Open(qemu.PID)
	if err != nil {
		return nil, 0, err
	}
	defer h.Close()
	if err := qemu.Check(); err != nil { // it may have ended meanwhile, and h may refer to another process
		return nil, 0, err
	}
	path, err := descriptorPath(qemu.PID, m)
	if err != nil || path == "" {
		return nil, 0, err
	}
	number, err := strconv.Atoi(filepath.Base(path))
	if err != nil {
		return nil, 0, err
	}
	fd, err := h.Descriptor(number)
	if err != nil {
		return nil, 0, fmt.Errorf("take descriptor %d of QEMU, %s: %w", number, m.Path, err)
	}
	f = os.NewFile(uintptr(fd), m.Path)
	if ok, err := writable(fd, m); !ok || err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, int64(m.Offset + addr - m.Start), nil
}

// writable reports whether a descriptor still belongs to the mapping's file and may be written to.
func writable(fd int, m process.Mapping) (bool, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return false, err
	}
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil {
		return false, err
	}
	return isFileOf(st, m) && flags&unix.O_ACCMODE == unix.O_RDWR, nil
}
