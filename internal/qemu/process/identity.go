// SPDX-License-Identifier: Apache-2.0

package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// Identity tells one process from all others that had or will have its PID. It can be stored and compared by a later
// process.
type Identity struct {
	PID       int    `json:"pid"`
	StartTime uint64 `json:"start_time"` // clock ticks since boot, field 22 of /proc/pid/stat (proc(5))
	BootID    string `json:"boot_id"`    // /proc/sys/kernel/random/boot_id
}

// ErrEnded means that a process has ended.
var ErrEnded = errors.New("it has ended")

// errZombie means that a process has ended and that its parent has not waited for it.
var errZombie = fmt.Errorf("%w, and its parent has not waited for it", ErrEnded)

// Alive reports whether the process may still run. It returns false only when the process has certainly ended. Where
// the kernel does not say, for example because this process has too many open files, it returns true: a caller then
// keeps what it has of a VM. A caller that needs a process that certainly runs uses Check.
func (i Identity) Alive() bool { return !errors.Is(i.Check(), ErrEnded) }

// Check returns nil when the process runs. errors.Is(err, ErrEnded) holds when it has ended: no process has its PID, a
// zombie or a later process has it, or the host was started again since. After any other error neither is known.
func (i Identity) Check() error {
	start, err := startTime(i.PID)
	if err == nil && start != i.StartTime {
		err = ErrEnded
	}
	var boot string
	if err == nil {
		boot, err = bootID()
	}
	if err == nil && boot != i.BootID {
		err = ErrEnded
	}
	switch {
	case errors.Is(err, ErrEnded):
		return fmt.Errorf("QEMU, process %d: %w", i.PID, err)
	case err != nil:
		return fmt.Errorf("cannot tell whether QEMU, process %d, runs: %w", i.PID, err)
	}
	return nil
}

// Kill kills the process, if it still exists, and returns when it is gone. It kills nothing and fails where it cannot
// tell whether the process still exists.
func (i Identity) Kill(ctx context.Context) error {
	if err := i.Check(); err != nil {
		return unlessEnded(err)
	}
	h, err := Open(i.PID)
	if err != nil {
		return err
	}
	defer h.Close()
	if err := i.Check(); err != nil { // it may have ended meanwhile, and h may refer to another process
		return unlessEnded(err)
	}
	if err := h.Kill(); err != nil {
		return fmt.Errorf("kill QEMU, process %d: %w", i.PID, err)
	}
	return h.Wait(ctx)
}

// unlessEnded returns an error of Check, or nil if it says that the process has ended.
func unlessEnded(err error) error {
	if errors.Is(err, ErrEnded) {
		return nil
	}
	return err
}

// Identify returns the identity of the process that has this PID now. It fails when the process has ended.
func Identify(pid int) (Identity, error) {
	start, err := startTime(pid)
	if err != nil {
		return Identity{}, fmt.Errorf("identify QEMU, process %d: %w", pid, err)
	}
	boot, err := bootID()
	if err != nil {
		return Identity{}, fmt.Errorf("identify QEMU, process %d: %w", pid, err)
	}
	return Identity{PID: pid, StartTime: start, BootID: boot}, nil
}

// startTime returns the start time of the process that has this PID now. The error is ErrEnded if there is none.
func startTime(pid int) (uint64, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) {
		return 0, fmt.Errorf("%w: %w", ErrEnded, err)
	}
	if err != nil {
		return 0, err
	}
	// The second field, the name, may contain any byte. No later field contains a bracket.
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	const at = 22 - 3 // counted from the third field
	if len(fields) <= at {
		return 0, fmt.Errorf("/proc/%d/stat is %q", pid, stat)
	}
	if fields[0][0] == 'Z' { // zombie: its memory is gone
		return 0, errZombie
	}
	start, err := strconv.ParseUint(string(fields[at]), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("start time in /proc/%d/stat: %w", pid, err)
	}
	return start, nil
}

// bootID returns the identity of this boot of the host. Its absence does not mean that a process has ended.
func bootID() (string, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return string(bytes.TrimSpace(boot)), err
}
