// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// covering returns the mappings that together are size bytes from addr on, if they are one memory: contiguous, all
// private or all shared, of one file or of none. QEMU makes one mapping, which madvise(2) and mbind(2) may split. nil:
// they are not.
func covering(maps []vma, addr, size uint64) []vma {
	var found []vma
	at := addr
	for _, m := range maps {
		if m.end <= at {
			continue
		}
		if m.start > at {
			return nil
		}
		if len(found) > 0 && !goesOn(found[len(found)-1], m) {
			return nil
		}
		found, at = append(found, m), m.end
		if at-addr >= size {
			return found
		}
	}
	return nil
}

// mappedAt returns the mapping that an address is in.
func mappedAt(maps []vma, addr uint64) (m vma, found bool) {
	at := slices.IndexFunc(maps, func(m vma) bool { return m.start <= addr && addr < m.end })
	if at < 0 {
		return m, false
	}
	return maps[at], true
}

// goesOn says that b goes on with what a maps.
func goesOn(a, b vma) bool {
	return b.start == a.end && a.shared == b.shared && a.writable == b.writable && sameFile(a, b) &&
		(a.inode == 0 || b.offset == a.offset+a.end-a.start)
}

func sameFile(a, b vma) bool { return a.major == b.major && a.minor == b.minor && a.inode == b.inode }

// anonymous says that a shared mapping has a file that only the kernel knows of: mmap(2) with MAP_SHARED and
// MAP_ANONYMOUS.
func anonymous(m vma) bool { return m.shared && strings.HasPrefix(m.path, "/dev/zero") }

// openablePath finds a path that leads to the file of a mapping whether it has a name or not: QEMU's own
// descriptor, or, had it closed that, the mapping itself.
func (vm *VM) openablePath(m vma) (string, error) {
	if path, err := descriptorPath(vm.Pid, m); path != "" || err != nil {
		return path, err
	}
	// Needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN (proc_pid_map_files(5)).
	path := fmt.Sprintf("/proc/%d/map_files/%s-%s", vm.Pid, strconv.FormatUint(m.start, 16), strconv.FormatUint(m.end, 16))
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("its file has neither a descriptor nor can the mapping be opened: %w", err)
	}
	return path, nil
}

// descriptorPath is a descriptor of a process that is of the mapping's file, in /proc; empty: it has none.
func descriptorPath(pid int, m vma) (string, error) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "", fmt.Errorf("descriptors of QEMU: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		var st unix.Stat_t
		if unix.Stat(path, &st) == nil && isFileOf(st, m) { // else it was closed meanwhile
			return path, nil
		}
	}
	return "", nil
}

func isFileOf(st unix.Stat_t, m vma) bool {
	return st.Ino == m.inode && unix.Major(st.Dev) == m.major && unix.Minor(st.Dev) == m.minor
}
