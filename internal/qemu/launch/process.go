// SPDX-License-Identifier: Apache-2.0

package launch

import (
	"context"
	"fmt"
	"strings"

	"github.com/migrated-vm/migrated/internal/qemu/process"
)

// Process is a QEMU that Launch started. It has a session of its own and no parent-death signal, so it outlives a
// daemon that is restarted or dies.
type Process struct {
	child
	handle  *process.Handle // open as long as p exists: Kill may be called at any time
	output  *output
	pidFile string // written by QEMU; empty: none
	exited  chan struct{}
	exitErr error // valid once exited is closed
}

// reap waits for QEMU's end. wait alone would return too early: when this process stops QEMU with ptrace to take a
// userfaultfd from it, a wait sees that stop (wait(2): a tracer's waits see its tracees' stops).
func (p *Process) reap() {
	defer close(p.exited)
	if p.exitErr = p.handle.Wait(context.Background()); p.exitErr == nil {
		p.exitErr = p.wait()
	}
}

// Pid returns the process ID.
func (p *Process) Pid() int { return p.pid }

// Exited returns a channel that is closed when the process has ended.
func (p *Process) Exited() <-chan struct{} { return p.exited }

// ExitReason returns QEMU's last lines of output and, once it has ended, how it exited. It is empty if neither is
// known. QEMU writes its reason before it closes its sockets, so the reason is available as soon as the QMP connection
// breaks.
func (p *Process) ExitReason() string {
	var parts []string
	if lines := p.output.lastLines(); lines != "" {
		parts = append(parts, lines)
	}
	select {
	case <-p.exited:
		if p.exitErr != nil {
			parts = append(parts, p.exitErr.Error())
		} else {
			parts = append(parts, "exit status 0")
		}
	default:
	}
	return strings.Join(parts, "; ")
}

// LastLines returns the last lines of QEMU's output, joined into one; empty if there are none.
func (p *Process) LastLines() string { return p.output.lastLines() }

// Kill kills QEMU and returns when it has ended.
func (p *Process) Kill(ctx context.Context) error {
	if err := p.handle.Kill(); err != nil {
		return fmt.Errorf("kill QEMU: %w", err)
	}
	select {
	case <-p.exited:
		return removePIDFile(p.pidFile, p.Pid())
	case <-ctx.Done():
		return fmt.Errorf("QEMU, process %d, was killed but has not ended: %w", p.Pid(), context.Cause(ctx))
	}
}
