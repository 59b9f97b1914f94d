// SPDX-License-Identifier: Apache-2.0

package process

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
)

// A Mapping is one line of /proc/PID/maps: a range of addresses that maps a range of one file.
type Mapping struct {
	Start, End uint64
	Writable   bool
	Shared     bool
	Offset     uint64 // in the file, bytes
	Major      uint32 // device of the file
	Minor      uint32
	Inode      uint64 // 0: no file
	Path       string // as the process opened it; " (deleted)" follows when the file was unlinked
}

// Maps are the mappings of a process, in the order of their addresses.
type Maps []Mapping

// ReadMaps reads the mappings of a process (proc_pid_maps(5)).
func ReadMaps(pid int) (Maps, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, fmt.Errorf("mappings of QEMU: %w", err)
	}
	var all Maps
	for line := range strings.Lines(string(text)) {
		m, err := parseMapping(strings.TrimSuffix(line, "\n"))
		if err != nil {
			return nil, fmt.Errorf("/proc/%d/maps: %q: %w", pid, line, err)
		}
		all = append(all, m)
	}
	return all, nil
}

// At returns the mapping that contains addr.
func (all Maps) At(addr uint64) (m Mapping, found bool) {
	at := slices.IndexFunc(all, func(m Mapping) bool { return m.Start <= addr && addr < m.End })
	if at < 0 {
		return m, false
	}
	return all[at], true
}

// parseMapping parses a line such as "7f00-7f10 rw-s 00000000 00:1b 15    /dev/shm/ram". The path may contain spaces.
// It does not use fmt, which is slow: a QEMU has hundreds of lines.
func parseMapping(line string) (m Mapping, err error) {
	fields := strings.SplitN(line, " ", 6)
	if len(fields) < 5 {
		return Mapping{}, fmt.Errorf("%d fields", len(fields))
	}
	number := func(field string, base, bits int) (v uint64) {
		if err == nil {
			v, err = strconv.ParseUint(field, base, bits)
		}
		return v
	}
	start, end, _ := strings.Cut(fields[0], "-")
	major, minor, _ := strings.Cut(fields[3], ":")
	m = Mapping{
		Start: number(start, 16, 64), End: number(end, 16, 64),
		Writable: strings.Contains(fields[1], "w"), Shared: strings.HasSuffix(fields[1], "s"),
		Offset: number(fields[2], 16, 64),
		Major:  uint32(number(major, 16, 32)), Minor: uint32(number(minor, 16, 32)),
		Inode: number(fields[4], 10, 64),
	}
	if len(fields) == 6 {
		m.Path = unescapeMaps(strings.TrimLeft(fields[5], " "))
	}
	return m, err
}

// unescapeMaps undoes the only escape that the kernel uses in these paths, "\012" for a line feed.
func unescapeMaps(path string) string { return strings.ReplaceAll(path, `\012`, "\n") }
