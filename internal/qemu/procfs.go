// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// A vma is one line of /proc/PID/maps: a run of addresses that map a run of one file.
type vma struct {
	start, end uint64
	writable   bool
	shared     bool
	offset     uint64 // in the file, bytes
	major      uint32 // device of the file
	minor      uint32
	inode      uint64 // 0: no file
	path       string // as the process opened it, " (deleted)" appended when it has no name any more
}

// readMaps returns the mappings of a process in the order of their addresses (proc_pid_maps(5)).
func readMaps(pid int) ([]vma, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, fmt.Errorf("mappings of QEMU: %w", err)
	}
	var all []vma
	for line := range strings.Lines(string(text)) {
		m, err := parseVMA(strings.TrimSuffix(line, "\n"))
		if err != nil {
			return nil, fmt.Errorf("/proc/%d/maps: %q: %w", pid, line, err)
		}
		all = append(all, m)
	}
	return all, nil
}

// parseVMA reads "7f00-7f10 rw-s 00000000 00:1b 15    /dev/shm/ram". The path may hold spaces.
func parseVMA(line string) (vma, error) {
	var m vma
	var perms string
	n, err := fmt.Sscanf(line, "%x-%x %s %x %x:%x %d", &m.start, &m.end, &perms, &m.offset, &m.major, &m.minor, &m.inode)
	if err != nil {
		return vma{}, fmt.Errorf("field %d: %w", n+1, err)
	}
	m.writable, m.shared = strings.Contains(perms, "w"), strings.HasSuffix(perms, "s")
	fields := strings.SplitN(line, " ", 6)
	if len(fields) == 6 {
		m.path = unescapeMaps(strings.TrimLeft(fields[5], " "))
	}
	return m, nil
}

// unescapeMaps undoes the only escape that the kernel makes in a path there, that of a line feed.
func unescapeMaps(path string) string { return strings.ReplaceAll(path, `\012`, "\n") }

// parseStatus reads a file like /proc/PID/status: "Name:\tvalue" lines.
func parseStatus(path string) (map[string]string, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	values := make(map[string]string)
	for line := range strings.Lines(string(text)) {
		if name, value, ok := strings.Cut(line, ":"); ok {
			values[name] = strings.TrimSpace(value)
		}
	}
	return values, nil
}

func readStatus(pid int) (map[string]string, error) {
	return parseStatus(fmt.Sprintf("/proc/%d/status", pid))
}

// readArgs returns the arguments of a process, argv[0] first.
func readArgs(pid int) ([]string, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return nil, fmt.Errorf("command line of QEMU: %w", err)
	}
	var args []string
	for arg := range bytes.SplitSeq(bytes.TrimSuffix(text, []byte{0}), []byte{0}) {
		args = append(args, string(arg))
	}
	return args, nil
}

// parseIDs reads white-space-separated user or group ids.
func parseIDs(text string) ([]uint32, error) {
	var ids []uint32
	for _, field := range strings.Fields(text) {
		id, err := strconv.ParseUint(field, 10, 32)
		if err != nil {
			return nil, err
		}
		ids = append(ids, uint32(id))
	}
	return ids, nil
}

// parseKiB reads "2048 kB".
func parseKiB(text string) (bytes uint64, err error) {
	number, isKiB := strings.CutSuffix(text, " kB")
	kib, err := strconv.ParseUint(number, 10, 54)
	if err != nil || !isKiB {
		return 0, fmt.Errorf("%q is no size", text)
	}
	return kib << 10, nil
}
