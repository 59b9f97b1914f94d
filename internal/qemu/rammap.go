// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// mappingsOf returns the shared mappings that together are the backend: contiguous in memory and in the
// file, its first byte first. QEMU makes one mapping, which madvise(2) and mbind(2) may split.
func (vm *VM) mappingsOf(b memoryBackend, maps []vma) ([]vma, error) {
	isFile := vm.fileMatcher(b)
	if b.kind == "memory-backend-memfd" && ambiguous(maps, isFile) {
		return nil, fmt.Errorf("several memory-backend-memfd have its size of %d bytes, and nothing tells which is which", b.Size)
	}
	var found []vma
	var size uint64
	for _, m := range maps {
		if size >= b.Size {
			break
		}
		if !m.shared || m.inode == 0 || !isFile(m) {
			continue
		}
		switch {
		case len(found) > 0 && m.start == found[len(found)-1].end && m.offset == found[0].offset+size && sameFile(m, found[0]):
			found, size = append(found, m), size+m.end-m.start
		case m.offset == b.offset:
			found, size = []vma{m}, m.end-m.start
		}
	}
	if size < b.Size {
		return nil, fmt.Errorf("it is not mapped, or only %d of its %d bytes are, in process %d", size, b.Size, vm.Pid)
	}
	return found, nil
}

// ambiguous tells whether more than one file matches.
func ambiguous(maps []vma, isFile func(vma) bool) bool {
	var first *vma
	for i, m := range maps {
		if !m.shared || !isFile(m) {
			continue
		}
		if first != nil && !sameFile(*first, m) {
			return true
		}
		first = &maps[i]
	}
	return false
}

func sameFile(a, b vma) bool { return a.major == b.major && a.minor == b.minor && a.inode == b.inode }

// fileMatcher tells a backend's mappings from others: by device and inode where its mem-path still leads to
// the file, else by the name under which QEMU opened it.
func (vm *VM) fileMatcher(b memoryBackend) func(vma) bool {
	if b.kind == "memory-backend-memfd" {
		// All of them have one name, so that only their size tells them apart; see ambiguous.
		return func(m vma) bool {
			return strings.HasPrefix(m.path, "/memfd:memory-backend-memfd") && m.end-m.start == b.Size
		}
	}
	path := fmt.Sprintf("/proc/%d/root%s", vm.Pid, b.memPath)
	if !filepath.IsAbs(b.memPath) {
		path = fmt.Sprintf("/proc/%d/cwd/%s", vm.Pid, b.memPath)
	}
	var st unix.Stat_t
	err := unix.Stat(path, &st)
	switch {
	case err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR:
		// QEMU made a file of its own there and removed its name (file_ram_open in softmmu/physmem.c).
		// Old machine types name it by the object's path.
		prefixes := []string{"qemu_back_mem." + b.ID + ".", "qemu_back_mem._objects_" + b.ID + "."}
		return func(m vma) bool {
			name := filepath.Base(m.path)
			return strings.HasPrefix(name, prefixes[0]) || strings.HasPrefix(name, prefixes[1])
		}
	case err == nil:
		return func(m vma) bool {
			return m.inode == st.Ino && m.major == unix.Major(st.Dev) && m.minor == unix.Minor(st.Dev) ||
				m.path == b.memPath+" (deleted)" // removed, and another file has the name now
		}
	default:
		return func(m vma) bool { return m.path == b.memPath+" (deleted)" }
	}
}

// openablePath finds a path that leads to the file of a mapping whether it has a name or not: QEMU's own
// descriptor, or, had it closed that, the mapping itself.
func (vm *VM) openablePath(m vma) (string, error) {
	dir := fmt.Sprintf("/proc/%d/fd", vm.Pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "", fmt.Errorf("descriptors of QEMU: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		var st unix.Stat_t
		if unix.Stat(path, &st) != nil {
			continue // closed meanwhile
		}
		if st.Ino == m.inode && unix.Major(st.Dev) == m.major && unix.Minor(st.Dev) == m.minor {
			return path, nil
		}
	}
	// Needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN (proc_pid_map_files(5)).
	path := fmt.Sprintf("/proc/%d/map_files/%s-%s", vm.Pid, strconv.FormatUint(m.start, 16), strconv.FormatUint(m.end, 16))
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("its file has neither a descriptor nor can the mapping be opened: %w", err)
	}
	return path, nil
}
