// SPDX-License-Identifier: Apache-2.0

// Package cgroup says how much memory the control groups of a process leave it (cgroups(7)), and starts processes in a
// group of their own. It knows both versions: the one hierarchy of version 2, and that of version 1 whose controller is
// memory.
package cgroup

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// A hierarchy is a mount of control groups.
type hierarchy struct {
	dir         string   // where it is mounted
	root        string   // the group that is seen there
	controllers []string // of version 1; nil: it is of version 2
}

// hierarchies reads those that this process sees (proc_pid_mountinfo(5)).
func hierarchies() (found []hierarchy, err error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("control groups: %w", err)
	}
	for line := range strings.Lines(string(text)) {
		mount, system, ok := strings.Cut(line, " - ")
		fields, kind := strings.Fields(mount), strings.Fields(system)
		if !ok || len(fields) < 5 || len(kind) < 3 {
			continue
		}
		h := hierarchy{root: fields[3], dir: fields[4]}
		switch kind[0] {
		case "cgroup2":
		case "cgroup":
			h.controllers = strings.Split(kind[2], ",")
		default:
			continue
		}
		found = append(found, h)
	}
	return found, nil
}

// has says whether a resource, as "memory" or "hugetlb.2MB", may be limited there.
func (h hierarchy) has(resource string) bool {
	controller, _, _ := strings.Cut(resource, ".")
	return h.controllers == nil || slices.Contains(h.controllers, controller)
}

// under is the directory of a group; one that is not below what is seen here is the highest that is.
func (h hierarchy) under(group string) string {
	rel, err := filepath.Rel(h.root, group)
	if err != nil || rel == ".." || strings.HasPrefix(rel, "../") || strings.HasPrefix(group, "/..") {
		return h.dir
	}
	return filepath.Join(h.dir, rel)
}

// A Groups is where a process is: a directory in each hierarchy.
type Groups []groupDir

type groupDir struct {
	hierarchy
	path string
}

// Of returns the groups that a process is in.
func Of(pid int) (Groups, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if errors.Is(err, fs.ErrNotExist) {
		if _, ours := os.Stat("/proc/self/cgroup"); errors.Is(ours, fs.ErrNotExist) {
			return nil, nil // the kernel has none
		}
	}
	if err != nil {
		return nil, fmt.Errorf("control groups of process %d: %w", pid, err)
	}
	mounted, err := hierarchies()
	if err != nil {
		return nil, err
	}
	var groups Groups
	for line := range strings.Lines(string(text)) {
		// "4:memory:/system.slice/x.service", "0::/…" of version 2.
		parts := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(parts) != 3 {
			continue
		}
		for _, h := range mounted {
			if parts[1] == "" && h.controllers == nil || parts[1] != "" && slices.Contains(h.controllers, strings.Split(parts[1], ",")[0]) {
				groups = append(groups, groupDir{h, h.under(parts[2])})
				break // the same hierarchy may be mounted again
			}
		}
	}
	return groups, nil
}

// A Limit is what a group grants of a resource.
type Limit struct {
	Group string // its directory
	File  string // the limit's, in there
	Max   uint64 // bytes, as is Used
	Used  uint64 // what the kernel could free at once left out
}

// Left is how much may still be taken.
func (l Limit) Left() uint64 { return l.Max - min(l.Max, l.Used) }

// Memory is the resource of ordinary pages.
const Memory = "memory"

// HugePages is the resource of huge pages of so many bytes.
func HugePages(size uint64) string {
	switch {
	case size >= 1<<30:
		return fmt.Sprintf("hugetlb.%dGB", size>>30)
	case size >= 1<<20:
		return fmt.Sprintf("hugetlb.%dMB", size>>20)
	default:
		return fmt.Sprintf("hugetlb.%dKB", size>>10)
	}
}

// Least is the limit, of the groups and all that are above them, that leaves the least of a resource; limited is false
// where there is none.
func (g Groups) Least(resource string) (least Limit, limited bool, err error) {
	for _, dir := range g {
		if !dir.has(resource) {
			continue
		}
		for path := dir.path; ; path = filepath.Dir(path) {
			l, has, err := dir.limit(path, resource)
			if err != nil {
				return Limit{}, false, err
			}
			if has && (!limited || l.Left() < least.Left()) {
				least, limited = l, true
			}
			if path == dir.dir || len(path) <= len(dir.dir) {
				break
			}
		}
	}
	return least, limited, nil
}

// limit reads that of one group; the highest groups, and those whose parents do not hand the controller on, have none.
func (h hierarchy) limit(path, resource string) (Limit, bool, error) {
	l := Limit{Group: path, File: resource + ".max"}
	used := resource + ".current"
	if h.controllers != nil {
		l.File, used = resource+".limit_in_bytes", resource+".usage_in_bytes"
	}
	var err error
	if l.Max, err = number(filepath.Join(path, l.File)); errors.Is(err, fs.ErrNotExist) {
		return Limit{}, false, nil
	}
	const none = math.MaxInt64 &^ (1<<16 - 1) // what version 1 calls none is of the size of a page less, or two
	if err != nil || l.Max >= none {
		return Limit{}, false, err
	}
	if l.Used, err = number(filepath.Join(path, used)); err != nil {
		return Limit{}, false, err
	}
	if resource == Memory {
		cached, err := h.cached(path)
		if err != nil {
			return Limit{}, false, err
		}
		l.Used -= min(l.Used, cached)
	}
	return l, true, nil
}

// cached is what a group has of files on disks, which the kernel drops before it refuses memory. Files on a tmpfs are
// not counted as such.
func (h hierarchy) cached(path string) (sum uint64, err error) {
	names := []string{"inactive_file", "active_file"}
	if h.controllers != nil {
		names = []string{"total_inactive_file", "total_active_file"}
	}
	text, err := os.ReadFile(filepath.Join(path, "memory.stat"))
	if err != nil {
		return 0, fmt.Errorf("control group: %w", err)
	}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if n, err := strconv.ParseUint(value, 10, 64); err == nil && slices.Contains(names, name) {
			sum += n
		}
	}
	return sum, nil
}

// number reads a file of one number, or "max".
func number(path string) (uint64, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, fmt.Errorf("control group: %w", err)
	}
	text = bytes.TrimSpace(text)
	if string(text) == "max" {
		return math.MaxUint64, nil
	}
	n, err := strconv.ParseUint(string(text), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("control group: %s: %w", path, err)
	}
	return n, nil
}
