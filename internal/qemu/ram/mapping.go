// SPDX-License-Identifier: Apache-2.0

package ram

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/qemu/process"
)

// covering returns the mappings that together cover size bytes from addr on. They must be one memory: contiguous, all
// private or all shared, and of one file or of none. Otherwise it returns nil. QEMU makes one mapping, but madvise(2)
// and mbind(2) may split it.
func covering(maps process.Maps, addr, size uint64) []process.Mapping {
	var found []process.Mapping
	at := addr
	for _, m := range maps {
		if m.End <= at {
			continue
		}
		if m.Start > at {
			return nil
		}
		if len(found) > 0 && !goesOn(found[len(found)-1], m) {
			return nil
		}
		found, at = append(found, m), m.End
		if at-addr >= size {
			return found
		}
	}
	return nil
}

// goesOn reports whether b directly continues a, in addresses and in the file.
func goesOn(a, b process.Mapping) bool {
	return b.Start == a.End && a.Shared == b.Shared && a.Writable == b.Writable && sameFile(a, b) &&
		(a.Inode == 0 || b.Offset == a.Offset+a.End-a.Start)
}

func sameFile(a, b process.Mapping) bool {
	return a.Major == b.Major && a.Minor == b.Minor && a.Inode == b.Inode
}

// anonymous reports whether a shared mapping has a file without a name, internal to the kernel: mmap(2) with MAP_SHARED
// and MAP_ANONYMOUS.
func anonymous(m process.Mapping) bool { return m.Shared && strings.HasPrefix(m.Path, "/dev/zero") }

// openablePath returns a path that opens the file of a mapping even if it was unlinked. It is the path of QEMU's own
// descriptor or, if QEMU has closed that, of the mapping.
func (mem *Memory) openablePath(m process.Mapping) (string, error) {
	if path, err := descriptorPath(mem.process.PID(), m); path != "" || err != nil {
		return path, err
	}
	// Opening a mapping needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN (proc_pid_map_files(5)).
	path := fmt.Sprintf("/proc/%d/map_files/%x-%x", mem.process.PID(), m.Start, m.End)
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("its file has neither a descriptor nor can the mapping be opened: %w", err)
	}
	return path, nil
}

// descriptorPath returns the path in /proc of a descriptor that the process has of the mapping's file, or "" if it has
// none.
func descriptorPath(pid int, m process.Mapping) (string, error) {
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

func isFileOf(st unix.Stat_t, m process.Mapping) bool {
	return st.Ino == m.Inode && unix.Major(st.Dev) == m.Major && unix.Minor(st.Dev) == m.Minor
}
