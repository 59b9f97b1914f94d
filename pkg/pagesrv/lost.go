// SPDX-License-Identifier: Apache-2.0

package pagesrv

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// isLost says whether err, of a read, means that nobody can read the page any more: the memory of the page is broken
// (EIO: memory_failure in mm/memory-failure.c), or its file is. Reads of the memory of a process that is being ended
// fail in the same way. Then nothing is known about the page.
func (b *openBlock) isLost(err error) bool {
	if !errors.Is(err, unix.EIO) && !errors.Is(err, unix.EHWPOISON) {
		return false
	}
	return b.PID == 0 || !isEnding(b.PID)
}

// PF_EXITING of include/linux/sched.h, and the bit of SIGKILL in masks of proc_pid_status(5).
const (
	taskExiting = 0x4
	killBit     = 1 << (unix.SIGKILL - 1)
)

// isEnding reports whether a process is being killed; true if that is not known. The kernel takes its memory away only
// after its threads were told to end.
func isEnding(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true
	}
	// The name, which is in brackets, may hold anything. State and flags are the third and the ninth field.
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if len(fields) < 7 || strings.ContainsAny(fields[0], "ZX") {
		return true
	}
	flags, err := strconv.ParseUint(fields[6], 10, 64)
	if err != nil || flags&taskExiting != 0 {
		return true
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return true
	}
	for line := range strings.Lines(string(status)) {
		name, value, _ := strings.Cut(line, ":")
		if name != "SigPnd" && name != "ShdPnd" {
			continue
		}
		if mask, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64); err != nil || mask&killBit != 0 {
			return true
		}
	}
	return false
}
