// SPDX-License-Identifier: Apache-2.0

package launch

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"

	"github.com/migrated-vm/migrated/internal/cgroup"
	"github.com/migrated-vm/migrated/internal/qemu/cmdline"
	"github.com/migrated-vm/migrated/internal/qemu/process"
)

// Options say how a QEMU is started.
type Options struct {
	Args        []string // argv, the binary's path first
	Credentials process.Credentials
	// Attributes are the attributes that QEMU gets. nil: those of its parent.
	Attributes *process.Attributes
	// Cgroup is the control group below which QEMU gets a group of its own; see cgroup.NewPlace. Empty: QEMU stays in its
	// parent's group.
	Cgroup  string
	Name    string // of QEMU's own control group
	Dir     string // working directory; "/" if it does not exist
	QMPPath string // where QEMU will listen; its directory must be writable for that user
	// PipePath is where Launch makes the pipe for QEMU's standard output and error. It exists as long as QEMU runs.
	PipePath string
	LogPath  string // of bounded size; gets QEMU's output
}

// workingDirectory returns the directory in which QEMU is started.
func (opts Options) workingDirectory() string {
	if info, err := os.Stat(opts.Dir); err != nil || !info.IsDir() {
		return "/"
	}
	return opts.Dir
}

// A child is a process that this one or a Starter started.
type child struct {
	pid int
	// wait returns how the process ended, once it has. Until then its PID is not reused.
	wait func() error
}

// Launch starts QEMU as a child of the Starter or, when s is nil, of this process. It does not wait until QEMU answers.
// It fails if another process listens at a socket that QEMU would take over, or if QEMU would take over or empty a file
// that another host may use. When it fails, no QEMU is left.
func (s *Starter) Launch(opts Options) (*Process, error) {
	line, err := cmdline.Parse(opts.Args)
	if err != nil {
		line = nil // QEMU reports it and ends: it neither listens nor writes a file
	}
	dir := opts.workingDirectory()
	sockets, err := line.Sockets(dir)
	if err != nil {
		return nil, err
	}
	for _, path := range append(sockets, opts.QMPPath) {
		if err := CheckUnused(path); err != nil {
			return nil, err
		}
	}
	files, err := line.Files(dir)
	if err != nil {
		return nil, err
	}
	for _, path := range files {
		if err := checkNotShared(path); err != nil {
			return nil, err
		}
	}
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
	p := &Process{child: c, output: out, pidFile: line.PIDFile(dir), exited: make(chan struct{})}
	if p.handle, err = process.Open(c.pid); err != nil { // for example, no descriptors are left
		return nil, errors.Join(err, syscall.Kill(c.pid, syscall.SIGKILL), c.wait())
	}
	go p.reap()
	return p, nil
}

// launch starts QEMU as a child of this process.
func launch(opts Options) (child, error) {
	pipe, err := writingEnd(opts.PipePath)
	if err != nil {
		return child{}, err
	}
	defer pipe.Close()
	cmd := exec.Command(opts.Args[0], opts.Args[1:]...)
	cmd.Dir = opts.workingDirectory()
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
			_ = place.Remove() // or the next NewPlace does
			return err
		}
		defer func() {
			if cmd.Process == nil {
				_ = place.Remove()
			}
		}()
	}
	if err := withAttributes(opts.Attributes, start); err != nil {
		err = fmt.Errorf("start QEMU as user %d, group %d: %w", c.UID, c.GID, err)
		if cmd.Process != nil {
			err = errors.Join(err, cmd.Process.Kill())
			_ = wait() // it was killed
		}
		return child{}, err
	}
	return child{cmd.Process.Pid, wait}, nil
}
