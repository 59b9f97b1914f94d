// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// At returns the groups at a path, such as "/vms", below each mount point. They need not exist: Least then finds the
// limits of those above.
func At(path string) (Groups, error) {
	mounted, err := hierarchies()
	if err != nil {
		return nil, err
	}
	var groups Groups
	for _, h := range mounted {
		if h.has(Memory) {
			groups = append(groups, groupDir{h, filepath.Join(h.dir, filepath.Clean("/"+path))})
		}
	}
	return groups, nil
}

// A Place is the control groups of one process and its children.
type Place struct {
	groups Groups
}

// prefix begins the names of all groups of Places.
const prefix = "migrated-"

// NewPlace makes groups named after name below the groups at the path parent, and parent as well if it is missing. It
// removes other Places' groups there that have no process.
func NewPlace(parent, name string) (*Place, error) {
	groups, err := At(parent)
	if err != nil {
		return nil, err
	}
	if len(groups) == 0 {
		return nil, errors.New("no control groups are mounted here")
	}
	p := &Place{}
	for _, g := range groups {
		left, err := filepath.Glob(filepath.Join(g.path, prefix+"*"))
		if err != nil {
			return nil, err
		}
		for _, dir := range left {
			_ = unix.Rmdir(dir) // those with processes stay
		}
		g.path = filepath.Join(g.path, prefix+name)
		if err := os.MkdirAll(g.path, 0o755); err != nil {
			return nil, errors.Join(fmt.Errorf("control group for QEMU: %w", err), p.Remove())
		}
		p.groups = append(p.groups, g)
	}
	return p, nil
}

// Start starts cmd in the groups. All of its memory is charged to them, none to the groups of this process.
func (p *Place) Start(cmd *exec.Cmd) error {
	// With version 1 a new process is in the groups of the thread that started it.
	ours, err := Of(os.Getpid())
	if err != nil {
		return err
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	err = p.start(cmd)
	for _, g := range ours {
		if g.controllers != nil && g.has(Memory) {
			if back := enter(g); back != nil {
				err = errors.Join(err, fmt.Errorf("back into this process' own control group: %w", back))
			}
		}
	}
	return err
}

// enter moves this thread into a group of version 1.
func enter(g groupDir) error {
	return os.WriteFile(filepath.Join(g.path, "tasks"), []byte(strconv.Itoa(unix.Gettid())), 0)
}

// start starts cmd. With version 1 it leaves this thread in the groups of p.
func (p *Place) start(cmd *exec.Cmd) error {
	for _, g := range p.groups {
		if g.controllers == nil {
			dir, err := os.Open(g.path)
			if err != nil {
				return fmt.Errorf("control group for QEMU: %w", err)
			}
			defer dir.Close()
			if cmd.SysProcAttr == nil {
				cmd.SysProcAttr = &syscall.SysProcAttr{}
			}
			cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(dir.Fd())
			continue
		}
		if err := enter(g); err != nil {
			return fmt.Errorf("control group for QEMU: %w", err)
		}
	}
	err := cmd.Start()
	if errors.Is(err, unix.ENOSYS) { // clone3(2), which systemd's RestrictNamespaces= refuses that way
		err = fmt.Errorf("start in a control group of its own: %w: "+
			"set RestrictNamespaces=no in the unit, as qemu_cgroup needs it", err)
	}
	return err
}

// Remove removes the groups, but for those that still have a process. A later NewPlace removes these.
func (p *Place) Remove() error {
	var errs []error
	for _, g := range p.groups {
		if err := unix.Rmdir(g.path); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.EBUSY) {
			errs = append(errs, fmt.Errorf("remove the control group %s: %w", g.path, err))
		}
	}
	return errors.Join(errs...)
}
