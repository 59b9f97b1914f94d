// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/migrated-vm/migrated/internal/cgroup"
)

// Credentials are the user and groups that QEMU runs as.
type Credentials struct {
	UID, GID uint32
	Groups   []uint32
}

// StartOptions say how Start starts QEMU.
type StartOptions struct {
	Args        []string // argv, the binary's path first
	Credentials Credentials
	// Attributes are given to it, a nil one's are those of its parent.
	Attributes *Attributes
	Cgroup     string // below which it is in a control group of its own, as cgroup.NewPlace takes it; empty: in its parent's
	Name       string // of that group
	Dir        string // working directory; "/" where it does not exist
	QMPPath    string // where QEMU will listen; its directory must be writable for that user
	PipePath   string // where the pipe is made that QEMU's standard output and error are; it stays for as long as QEMU runs
	LogPath    string // of bounded size, takes what QEMU writes
}

// Process is a QEMU that Start started. It is in a session of its own and without a parent-death signal: it
// outlives a daemon that is restarted or dies.
type Process struct {
	child
	pidfd   *os.File // open for as long as p is: Kill may come at any time
	output  *output
	pidFile string // that QEMU writes; empty: none
	exited  chan struct{}
	exitErr error // valid once exited is closed
}

// A child is a process that this one or a Starter started.
type child struct {
	pid int
	// wait returns how it ended, once it has. Until then nobody else has its number.
	wait func() error
}

// Start starts QEMU as a child of this process and returns when its QMP socket answers. When it fails, no QEMU is
// left.
func Start(ctx context.Context, opts StartOptions) (*Process, *VM, error) {
	return (*Starter)(nil).Start(ctx, opts)
}

// Start is the function Start; s, unless it is nil, becomes QEMU's parent.
func (s *Starter) Start(ctx context.Context, opts StartOptions) (*Process, *VM, error) {
	for _, path := range append(listensAt(opts.Args, opts.Dir), opts.QMPPath) {
		if err := checkUnused(path); err != nil {
			return nil, nil, err
		}
	}
	p, err := s.process(opts)
	if err != nil {
		return nil, nil, err
	}
	vm, err := p.awaitQMP(ctx, opts.QMPPath)
	if err != nil {
		// Not ctx, which may be what ended; SIGKILL needs no time.
		killCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), quitPatience)
		defer cancel()
		return nil, nil, errors.Join(err, p.Kill(killCtx))
	}
	return p, vm, nil
}

func (s *Starter) process(opts StartOptions) (*Process, error) {
	start, pipe := launch, makePipe
	if s != nil {
		start, pipe = s.launch, s.makePipe
	}
	if err := pipe(opts.PipePath); err != nil {
		return nil, err
	}
	out, err := openOutput(opts.PipePath, opts.LogPath)
	if err != nil {
		return nil, errors.Join(err, os.Remove(opts.PipePath))
	}
	c, err := start(opts)
	if err != nil {
		return nil, errors.Join(err, out.discard())
	}
	go out.follow()
	p := &Process{child: c, output: out, pidFile: pidFile(opts.Args, opts.Dir), exited: make(chan struct{})}
	if p.pidfd, err = openPidfd(c.pid); err != nil { // no descriptors left, say
		return nil, errors.Join(err, syscall.Kill(c.pid, syscall.SIGKILL), c.wait())
	}
	go p.reap()
	return p, nil
}

// launch starts QEMU as a child of this process.
func launch(opts StartOptions) (child, error) {
	pipe, err := writingEnd(opts.PipePath)
	if err != nil {
		return child{}, err
	}
	defer pipe.Close()
	cmd := exec.Command(opts.Args[0], opts.Args[1:]...)
	cmd.Dir = opts.Dir
	if info, err := os.Stat(opts.Dir); err != nil || !info.IsDir() {
		cmd.Dir = "/"
	}
	cmd.Stdout, cmd.Stderr = pipe, pipe
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	c := opts.Credentials
	if int(c.UID) != os.Geteuid() || int(c.GID) != os.Getegid() || os.Geteuid() == 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: c.UID, Gid: c.GID, Groups: c.Groups}
	}
	start, wait := cmd.Start, cmd.Wait
	if opts.Cgroup != "" {
		place, err := cgroup.NewPlace(opts.Cgroup, opts.Name)
		if err != nil {
			return child{}, err
		}
		start = func() error { return place.Start(cmd) }
		wait = func() error {
			err := cmd.Wait()
			_ = place.Remove() // or the next one does
			return err
		}
		defer func() {
			if cmd.Process == nil {
				_ = place.Remove()
			}
		}()
	}
	if err := opts.Attributes.during(start); err != nil {
		err = fmt.Errorf("start QEMU as user %d, group %d: %w", c.UID, c.GID, err)
		if cmd.Process != nil {
			err = errors.Join(err, cmd.Process.Kill())
			_ = wait() // it was killed
		}
		return child{}, err
	}
	return child{cmd.Process.Pid, wait}, nil
}

// reap waits for QEMU to end. Not with wait alone: that returns too early when
// this very process stops QEMU with ptrace to take a userfaultfd from it
// (wait(2): a tracer's waits see its tracees' stops).
func (p *Process) reap() {
	defer close(p.exited)
	if p.exitErr = waitExit(context.Background(), p.pidfd); p.exitErr == nil {
		p.exitErr = p.wait()
	}
}

// awaitQMP tries to attach until that succeeds, QEMU ends or ctx does.
func (p *Process) awaitQMP(ctx context.Context, path string) (*VM, error) {
	const firstPause, longestPause = time.Millisecond, 20 * time.Millisecond
	for pause := firstPause; ; pause = min(2*pause, longestPause) {
		vm, err := Attach(ctx, path)
		if err == nil && vm.Pid == p.Pid() {
			return vm, nil
		}
		if err == nil {
			err = fmt.Errorf("process %d listens at %s instead of process %d, which was started", vm.Pid, path, p.Pid())
			return nil, errors.Join(err, vm.Close())
		}
		select {
		case <-p.exited:
			return nil, fmt.Errorf("QEMU ended before its QMP socket %s answered: %s", path, p.ExitReason())
		case <-ctx.Done():
			return nil, fmt.Errorf("QEMU's QMP socket %s does not answer: %w (last attempt: %w)%s", path, context.Cause(ctx), err, p.said())
		case <-time.After(pause):
		}
	}
}

// Pid is the process id.
func (p *Process) Pid() int { return p.pid }

// Exited is closed when the process has ended.
func (p *Process) Exited() <-chan struct{} { return p.exited }

// ExitReason is why QEMU ended: its last lines, and how it exited once it has. It is empty while there is
// nothing to tell. QEMU writes its reason before it closes its sockets, so a broken QMP connection is reason
// enough to ask.
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

func (p *Process) said() string {
	if lines := p.output.lastLines(); lines != "" {
		return "; QEMU says: " + lines
	}
	return ""
}

// Kill ends QEMU at once and returns when it has ended.
func (p *Process) Kill(ctx context.Context) error {
	if err := killPidfd(p.pidfd); err != nil {
		return fmt.Errorf("kill QEMU: %w", err)
	}
	select {
	case <-p.exited:
		return removePIDFile(p.pidFile, p.Pid())
	case <-ctx.Done():
		return fmt.Errorf("QEMU, process %d, was killed but has not ended: %w", p.Pid(), context.Cause(ctx))
	}
}
