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
	"sync"
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

// unfilled are the paths of the groups that this process has made and that have had no process yet. NewPlace holds mu
// from its look at them to the end of its removals: starts run at the same time.
var (
	mu       sync.Mutex
	unfilled = make(map[string]bool)
)

// NewPlace makes groups named after name below the groups at the path parent, and parent as well if it is missing. It
// removes other Places' groups there that have no process, but for those of this process that Start is still to fill.
// The caller calls Start or Remove.
func NewPlace(parent, name string) (*Place, error) {
	groups, err := At(parent)
	if err != nil {
		return nil, err
	}
	if len(groups) == 0 {
		return nil, errors.New("no control groups are mounted here")
	}
	mu.Lock()
	defer mu.Unlock()
	p := &Place{}
	for _, g := range groups {
		left, err := filepath.Glob(filepath.Join(g.path, prefix+"*"))
		if err != nil {
			return nil, err
		}
		for _, dir := range left {
			if !unfilled[dir] {
				_ = unix.Rmdir(dir) // those with processes stay
			}
		}
		g.path = filepath.Join(g.path, prefix+name)
		if err := os.MkdirAll(g.path, 0o755); err != nil {
			return nil, errors.Join(fmt.Errorf("control group for QEMU: %w", err), p.remove())
		}
		unfilled[g.path] = true
		p.groups = append(p.groups, g)
	}
	return p, nil
}

// Start starts cmd in the groups. All of its memory is charged to them, none to the groups of this process.
func (p *Place) Start(cmd *exec.Cmd) error {
	defer p.filled()
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

// filled lets a later NewPlace remove the groups once they have no process.
func (p *Place) filled() {
	mu.Lock()
	defer mu.Unlock()
	for _, g := range p.groups {
		delete(unfilled, g.path)
	}
}

// Remove removes the groups, but for those that still have a process. A later NewPlace removes these.
func (p *Place) Remove() error {
	mu.Lock()
	defer mu.Unlock()
	return p.remove()
}

// remove is Remove for a caller that holds mu.
func (p *Place) remove() error {
	var errs []error
	for _, g := range p.groups {
		delete(unfilled, g.path)
		if err := unix.Rmdir(g.path); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.EBUSY) {
			errs = append(errs, fmt.Errorf("remove the control group %s: %w", g.path, err))
		}
	}
	return errors.Join(errs...)
}
