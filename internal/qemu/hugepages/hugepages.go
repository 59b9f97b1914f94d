// SPDX-License-Identifier: Apache-2.0

// Package hugepages finds out whether shared memory may have transparent huge pages. When Linux before 6.4 makes one,
// it fills the missing pages in its range with zeros (uffd.CollapseFillsMissing). A VM whose memory has not all arrived
// would read these zeros. internal/qemu/ram refuses such memory, and internal/qemu/check warns about the settings that
// permit it.
package hugepages

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/printable"
	"github.com/migrated-vm/migrated/internal/qemu/process"
)

// ShmemEnabled is the file of the kernel's setting for transparent huge pages in shared memory. The setting applies to
// memory on no mounted tmpfs. It can also override the mount option of a tmpfs
// (Documentation/admin-guide/mm/transhuge.rst).
const ShmemEnabled = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"

// Some values of ShmemEnabled and of the mount option huge=.
const (
	never = "never"
	Deny  = "deny"  // never, even if the mount option of a tmpfs says otherwise
	Force = "force" // always, even if the mount option of a tmpfs says otherwise
)

// Permitted reports whether the shared memory that a process has mapped at addr may have transparent huge pages.
func Permitted(pid int, addr uint64) (bool, error) {
	settings, err := SettingsOf(pid)
	if err != nil {
		return false, err
	}
	where, err := settings.At(addr)
	return where.Permitted(), err
}

// A Place holds the settings that decide about huge pages of one piece of shared memory.
type Place struct {
	Setting string // content of ShmemEnabled
	Mount   *Mount // nil: on no mounted tmpfs
}

// Permitted reports whether khugepaged may make huge pages there. "advise" counts as permitted, because QEMU advises
// the kernel to use huge pages (MADV_HUGEPAGE).
func (h Place) Permitted() bool {
	switch {
	case h.Setting == "" || h.Setting == Deny:
		return false
	case h.Setting == Force:
		return true
	case h.Mount != nil:
		return h.Mount.Huge != "" && h.Mount.Huge != never
	}
	return h.Setting != never
}

// Because names the setting that permits huge pages.
func (h Place) Because() string {
	if h.Mount != nil && h.Setting != Force {
		return fmt.Sprintf("%s is mounted with huge=%s", printable.Line(h.Mount.Point), h.Mount.Huge)
	}
	return ShmemEnabled + " is " + h.Setting
}

// Remedy says how to change that setting. A change also applies to memory that is mapped already.
func (h Place) Remedy() string {
	change := "echo never > " + ShmemEnabled
	if h.Mount != nil && h.Setting != Force {
		change = "mount -o remount,huge=never " + printable.Line(h.Mount.Point)
	}
	return "use Linux 6.4 or newer, or do at the destination: " + change
}

// Setting reads ShmemEnabled. It returns "" if the kernel has no transparent huge pages in shared memory.
func Setting() (string, error) {
	text, err := os.ReadFile(ShmemEnabled)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("transparent huge pages of shared memory: %w", err)
	}
	_, rest, found := strings.Cut(string(text), "[")
	setting, _, ended := strings.Cut(rest, "]")
	if !found || !ended {
		return "", fmt.Errorf("transparent huge pages of shared memory: %s is %q, none of which is chosen",
			ShmemEnabled, text)
	}
	return setting, nil
}

// Settings hold everything that decides about huge pages in a process's shared memory.
type Settings struct {
	pid     int
	enabled string // from Setting; empty: the kernel has none, and the rest is not read
	maps    process.Maps
	mounts  []Mount // of the process, then of this one: only this one may see the mount of a handed file
}

// SettingsOf reads the settings of a process.
func SettingsOf(pid int) (s Settings, err error) {
	s.pid = pid
	if s.enabled, err = Setting(); err != nil || s.enabled == "" {
		return s, err
	}
	if s.maps, err = process.ReadMaps(pid); err != nil {
		return s, err
	}
	for _, who := range []int{pid, os.Getpid()} {
		mounts, err := Mounts(who)
		if err != nil {
			return s, err
		}
		s.mounts = append(s.mounts, mounts...)
	}
	return s, nil
}

// At returns the settings that apply to the memory mapped at addr.
func (s Settings) At(addr uint64) (Place, error) {
	if s.enabled == "" {
		return Place{}, nil
	}
	m, found := s.maps.At(addr)
	if !found {
		return Place{}, fmt.Errorf("process %d has nothing mapped at %#x", s.pid, addr)
	}
	h := Place{Setting: s.enabled}
	device := unix.Mkdev(m.Major, m.Minor)
	if at := slices.IndexFunc(s.mounts, func(t Mount) bool { return t.Device == device }); at >= 0 {
		h.Mount = &s.mounts[at]
	}
	return h, nil
}

// A Mount is a tmpfs that a process sees. The kernel's internal tmpfs, which holds memfds and shared memory without a
// file, is mounted nowhere and so is no Mount.
type Mount struct {
	Device uint64
	Point  string
	Huge   string // value of huge=; empty: never
}

// Mounts returns the tmpfs mounts that a process sees.
func Mounts(pid int) (mounts []Mount, err error) {
	table, err := os.Open(fmt.Sprintf("/proc/%d/mountinfo", pid))
	if err != nil {
		return nil, fmt.Errorf("mounts of process %d: %w", pid, err)
	}
	defer table.Close()
	all, err := mountinfo.GetMountsFromReader(table, mountinfo.FSTypeFilter("tmpfs"))
	if err != nil {
		return nil, fmt.Errorf("/proc/%d/mountinfo: %w", pid, err)
	}
	for _, m := range all {
		t := Mount{Device: unix.Mkdev(uint32(m.Major), uint32(m.Minor)), Point: m.Mountpoint}
		for option := range strings.SplitSeq(m.VFSOptions, ",") {
			if value, is := strings.CutPrefix(option, "huge="); is {
				t.Huge = value
			}
		}
		mounts = append(mounts, t)
	}
	return mounts, nil
}
