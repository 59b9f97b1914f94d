// SPDX-License-Identifier: Apache-2.0

package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
)

// Identity tells one process from all others that had or will have its PID. It can be stored and compared by a later
// process.
type Identity struct {
	PID       int    `json:"pid"`
	StartTime uint64 `json:"start_time"` // clock ticks since boot, field 22 of /proc/pid/stat (proc(5))
	BootID    string `json:"boot_id"`    // /proc/sys/kernel/random/boot_id
}

// errEnded means that a process has ended and that its parent has not waited for it.
var errEnded = errors.New("it has ended")

// Alive reports whether the process still runs.
func (i Identity) Alive() bool {
	now, err := Identify(i.PID)
	return err == nil && now == i
}

// Kill kills the process, if it still exists, and returns when it is gone.
func (i Identity) Kill(ctx context.Context) error {
	if !i.Alive() {
		return nil
	}
	h, err := Open(i.PID)
	if err != nil {
		return err
	}
	defer h.Close()
	if !i.Alive() { // it ended meanwhile, and h may refer to another process
		return nil
	}
	if err := h.Kill(); err != nil {
		return fmt.Errorf("kill QEMU, process %d: %w", i.PID, err)
	}
	return h.Wait(ctx)
}

// Identify returns the identity of the process that has this PID now. It fails when the process has ended.
func Identify(pid int) (Identity, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return Identity{}, fmt.Errorf("identify QEMU: %w", err)
	}
	// The second field, the name, may contain any byte. No later field contains a bracket.
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	const startTime = 22 - 3 // counted from the third field
	if len(fields) <= startTime {
		return Identity{}, fmt.Errorf("identify QEMU: /proc/%d/stat is %q", pid, stat)
	}
	if fields[0][0] == 'Z' { // zombie: its memory is gone
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
