// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// OpenRAMFile opens the file that a QEMU has mapped, shared and writable, at an address: QEMU's own descriptor, so that
// neither the file's name nor its permissions matter. offset is where the address is in it. nil: what is mapped there is
// private, or QEMU has no descriptor of it that can be written to. It asks QEMU nothing.
func OpenRAMFile(qemu Identity, addr uint64) (f *os.File, offset int64, err error) {
	maps, err := readMaps(qemu.PID)
	if err != nil {
		return nil, 0, err
	}
	m, found := mappedAt(maps, addr)
	if !found {
		return nil, 0, fmt.Errorf("QEMU, process %d, has nothing mapped at %#x", qemu.PID, addr)
	}
	if !m.shared || !m.writable || m.inode == 0 {
		return nil, 0, nil
	}
	pidfd, err := openPidfd(qemu.PID)
	if err != nil {
		return nil, 0, err
	}
	defer pidfd.Close()
	if !qemu.Alive() { // it ended meanwhile, and pidfd may be another's
		return nil, 0, fmt.Errorf("QEMU, process %d, has ended", qemu.PID)
	}
	path, err := descriptorPath(qemu.PID, m)
	if err != nil || path == "" {
		return nil, 0, err
	}
	number, err := strconv.Atoi(filepath.Base(path))
	if err != nil {
		return nil, 0, err
	}
	fd, err := unix.PidfdGetfd(int(pidfd.Fd()), number, 0)
	if err != nil {
		return nil, 0, fmt.Errorf("take descriptor %d of QEMU, %s: %w", number, m.path, err)
	}
	f = os.NewFile(uintptr(fd), m.path)
	if ok, err := writable(fd, m); !ok || err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, int64(m.offset + addr - m.start), nil
}

// writable says whether a descriptor is still one of the mapping's file, and may be written to.
func writable(fd int, m vma) (bool, error) {
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
