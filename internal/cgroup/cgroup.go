// SPDX-License-Identifier: Apache-2.0

// Package cgroup reads how much memory a process may still take by the limits of its control groups (cgroups(7)), and
// starts processes in groups of their own. It supports version 2, and of version 1 the hierarchy whose controller is
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

	"github.com/moby/sys/mountinfo"
)

// A hierarchy is a mounted file system of control groups.
type hierarchy struct {
	dir         string   // the mount point
	root        string   // the group that the mount point shows; not "/" in a container
	controllers []string // of version 1; nil: version 2
}

// hierarchies returns those that are mounted where this process sees them (proc_pid_mountinfo(5)).
func hierarchies() (found []hierarchy, err error) {
	table, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("control groups: %w", err)
	}
	defer table.Close()
	mounts, err := mountinfo.GetMountsFromReader(table, mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return nil, fmt.Errorf("control groups: /proc/self/mountinfo: %w", err)
	}
	for _, m := range mounts {
		h := hierarchy{root: m.Root, dir: m.Mountpoint}
		if m.FSType == "cgroup" {
			h.controllers = strings.Split(m.VFSOptions, ",")
		}
		found = append(found, h)
	}
	return found, nil
}

// has says whether the hierarchy can limit a resource, such as "memory" or "hugetlb.2MB".
func (h hierarchy) has(resource string) bool {
	controller, _, _ := strings.Cut(resource, ".")
	return h.controllers == nil || slices.Contains(h.controllers, controller)
}

// dirOf returns the directory of a group. For a group outside of h.root, which is not visible here, it returns the
// mount point.
func (h hierarchy) dirOf(group string) string {
	rel, err := filepath.Rel(h.root, group)
	if err != nil || rel == ".." || strings.HasPrefix(rel, "../") || strings.HasPrefix(group, "/..") {
		return h.dir
	}
	return filepath.Join(h.dir, rel)
}

// Groups are the control groups of a process: a directory in each hierarchy.
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
			return nil, nil // the kernel has no control groups
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
			if parts[1] == "" && h.controllers == nil ||
				parts[1] != "" && slices.Contains(h.controllers, strings.Split(parts[1], ",")[0]) {
				groups = append(groups, groupDir{h, h.dirOf(parts[2])})
				break // the same hierarchy may be mounted again
			}
		}
	}
	return groups, nil
}

// A Limit is how much of a resource a group may use.
type Limit struct {
	Group string // the group's directory
	File  string // the name of the file in Group that sets the limit
	Max   uint64 // bytes
	Used  uint64 // bytes, without those that the kernel can free at once
}

// Left returns how many bytes the group may still take.
func (l Limit) Left() uint64 { return l.Max - min(l.Max, l.Used) }

// Memory is the resource of ordinary pages.
const Memory = "memory"

// HugePages returns the resource of huge pages of that size in bytes.
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

// Least returns the limit that leaves the least of a resource, among those of the groups and of all groups above them.
// limited is false if there is no limit.
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

// limit reads the limit of one group. The top group has none, nor has one whose parent does not enable the controller
// for it.
func (h hierarchy) limit(path, resource string) (Limit, bool, error) {
	l := Limit{Group: path, File: resource + ".max"}
	used := resource + ".current"
	if h.controllers != nil {
		l.File, used = resource+".limit_in_bytes", resource+".usage_in_bytes"
	}
	var err error
	if l.Max, err = readNumber(filepath.Join(path, l.File)); errors.Is(err, fs.ErrNotExist) {
		return Limit{}, false, nil
	}
	const none = math.MaxInt64 &^ (1<<16 - 1) // version 1 has no "max": it shows MaxInt64, rounded down to pages
	if err != nil || l.Max >= none {
		return Limit{}, false, err
	}
	if l.Used, err = readNumber(filepath.Join(path, used)); err != nil {
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

// cached returns the bytes of a group's page cache of files on disks, which the kernel drops before it refuses memory.
// Pages of a tmpfs are not among them.
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

// readNumber reads a file that has one number, or "max", which it returns as MaxUint64.
func readNumber(path string) (uint64, error) {
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
