// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
)

// Identity tells one process from all others that had its number or will have it, so that it may be written
// down and compared by a later process.
type Identity struct {
	PID       int    `json:"pid"`
	StartTime uint64 `json:"start_time"` // clock ticks since boot, field 22 of /proc/pid/stat (proc(5))
	BootID    string `json:"boot_id"`    // /proc/sys/kernel/random/boot_id
}

// errEnded says that a process has ended, and its parent has not waited for it.
var errEnded = errors.New("it has ended")

// Identity is that of the QEMU process.
func (vm *VM) Identity() (Identity, error) { return identify(vm.Pid) }

// Alive says whether the process still exists.
func (i Identity) Alive() bool {
	now, err := identify(i.PID)
	return err == nil && now == i
}

// Kill ends the process, if it still exists, and returns when it is gone.
func (i Identity) Kill(ctx context.Context) error {
	if !i.Alive() {
		return nil
	}
	pidfd, err := openPidfd(i.PID)
	if err != nil {
		return err
	}
	defer pidfd.Close()
	if !i.Alive() { // it ended meanwhile, and pidfd may be another's
		return nil
	}
	if err := killPidfd(pidfd); err != nil {
		return fmt.Errorf("kill QEMU, process %d: %w", i.PID, err)
	}
	return waitExit(ctx, pidfd)
}

func identify(pid int) (Identity, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return Identity{}, fmt.Errorf("identify QEMU: %w", err)
	}
	// The second field, the name, may hold anything, but no later one has a bracket.
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	const startTime = 22 - 3 // counted from the third
	if len(fields) <= startTime {
		return Identity{}, fmt.Errorf("identify QEMU: /proc/%d/stat is %q", pid, stat)
	}
	if fields[0][0] == 'Z' { // it has ended, and its memory is gone
		return Identity{}, fmt.Errorf("identify QEMU: process %d: %w", pid, errEnded)
	}
	start, err := strconv.ParseUint(string(fields[startTime]), 10, 64)
	if err != nil {
		return Identity{}, fmt.Errorf("identify QEMU: start time of process %d: %w", pid, err)
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return Identity{}, fmt.Errorf("identify QEMU: %w", err)
	}
	return Identity{PID: pid, StartTime: start, BootID: string(bytes.TrimSpace(boot))}, nil
}
