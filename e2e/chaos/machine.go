// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/migrated-vm/migrated/e2e/lab"
)

// qemuProgram is the name by which QEMU's processes are found.
const qemuProgram = "qemu-system-x86_64"

// A machine is a VM that lives on one of the two hosts, with paths of its own there.
type machine struct {
	name   string
	config lab.VMConfig
	lab    *lab.Lab
	runner runner
	at     *lab.Host // where it runs
	hosts  []*lab.Host

	copies  *copies
	checker checker
	end     context.CancelFunc
}

// A checker knows what is in a machine's memory.
type checker interface {
	// begin is called before the migration, with the machine on its host.
	begin(ctx context.Context, m *machine) error
	// verify checks all of the memory of the machine, which runs on m.at, and its disks. Damage to disks is in the result
	// and not in the error.
	verify(ctx context.Context, m *machine) (damage, error)
	// said returns what the guest has found so far by itself.
	said() (damage, error)
	// stall returns the longest time that the guest itself has stood still since a moment.
	stall(since time.Time) time.Duration
	// left is called when the VM has left h, or has ended there. What comes from h afterwards is another VM's.
	left(h *lab.Host) error
	// forget is called when the guest of the machine begins anew, so that its earlier reports no longer count. It returns
	// when the guest is there again.
	forget(ctx context.Context, m *machine) error
	close()
}

// damage is how much of a machine differs from what its guest wrote.
type damage struct {
	pages  uint64 // of memory
	blocks uint64 // of disks, and requests to them that failed
	detail string // of blocks
}

// dir returns the machine's directory on both hosts.
func (m *machine) dir() string { return dirOf(m.name) }

func dirOf(name string) string { return "/run/" + name }

// path turns a path of the lab's only VM into this machine's.
func (m *machine) path(labPath string) string { return moved(m.name, labPath) }

func moved(name, text string) string {
	text = strings.ReplaceAll(text, lab.VMDir+"/", dirOf(name)+"/")
	return strings.ReplaceAll(text, "/guest-", "/"+name+"-") // its RAM and its disks
}

// newMachine starts a VM like the lab's, but with a name, a directory, RAM files and disks of its own. files are what
// the lab's VM boots from, by their names in that directory.
func (s *stage) newMachine(
	ctx context.Context, name string, c lab.VMConfig, at *lab.Host, files map[string]string, check checker,
) (*machine, error) {
	c.Extra = append(c.Extra, lab.EventsArgs()...)
	m := &machine{name: name, config: c, lab: s.lab, runner: s.runner, at: at, hosts: s.lab.Hosts(), checker: check}
	for _, h := range m.hosts {
		if err := os.MkdirAll(h.Path(m.dir()), 0o755); err != nil {
			return nil, err
		}
		for to, from := range files {
			content, err := os.ReadFile(from)
			if err != nil {
				return nil, err
			}
			if err := os.WriteFile(h.Path(filepath.Join(m.dir(), to)), content, 0o644); err != nil {
				return nil, err
			}
		}
	}
	if err := errors.Join(s.lab.MakeStorage(ctx, c, m.path), s.lab.MakeNICs(ctx, c)); err != nil {
		return nil, err
	}
	watching, end := context.WithCancel(context.WithoutCancel(ctx))
	m.end = end
	m.copies = watchCopies(watching, m.path(lab.EventsPath), m.hosts...)
	for _, h := range m.hosts {
		if err := m.checker.left(h); err != nil {
			return m, err
		}
	}
	return m, m.runner.start(ctx, m)
}

// destroy ends the machine's QEMUs on both hosts and removes its files.
func (m *machine) destroy(ctx context.Context) error {
	var errs []error
	for _, h := range m.hosts {
		if err := m.kill(ctx, h); !errors.Is(err, errNoQEMU) {
			errs = append(errs, err)
		}
	}
	errs = append(errs, m.runner.forget(ctx, m))
	m.end()
	m.copies.end()
	m.checker.close()
	for _, h := range m.hosts {
		for _, file := range m.config.RAMFiles() {
			if err := os.Remove(h.Path(m.path(file))); !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
		}
	}
	for _, file := range m.config.DiskFiles() {
		errs = append(errs, os.Remove(m.lab.Shared(m.path(file))))
	}
	return errors.Join(errs...)
}

// setRunning continues or stops the VM, as its operator can.
func (m *machine) setRunning(ctx context.Context, run bool) error {
	if !await(ctx, 20*time.Second, func() bool { return m.copies.client(m.at) != nil }) {
		return fmt.Errorf("nobody knows the QEMU of %s on host %s", m.name, m.at.Name)
	}
	if err := m.runner.setRunning(ctx, m, m.at, run); err != nil {
		return err
	}
	if !await(ctx, 20*time.Second, func() bool { return m.copies.runs(m.at) == run }) {
		return fmt.Errorf("VM %s does not come to run: %v", m.name, run)
	}
	return nil
}

// qemu returns the PID of the machine's QEMU on h, 0 if there is none.
func (m *machine) qemu(h *lab.Host) (int, error) {
	pids, err := h.Processes(qemuProgram)
	if err != nil {
		return 0, err
	}
	for _, pid := range pids {
		command, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
		if err == nil && bytes.Contains(command, []byte(m.path(lab.EventsPath))) {
			return pid, nil
		}
	}
	return 0, nil
}

// errNoQEMU says that the QEMU that an operation needs is not there.
var errNoQEMU = fmt.Errorf("%w: there is no QEMU", errTooLate)

// signal signals the machine's QEMU on h.
func (m *machine) signal(h *lab.Host, signal syscall.Signal) error {
	pid, err := m.qemu(h)
	if err != nil {
		return err
	}
	if pid == 0 {
		return errNoQEMU
	}
	if err := syscall.Kill(pid, signal); err != nil && !errors.Is(err, syscall.ESRCH) {
		return err
	}
	return nil
}

// kill ends the machine's QEMU on h and returns when it is gone.
func (m *machine) kill(ctx context.Context, h *lab.Host) error {
	if err := m.signal(h, syscall.SIGKILL); err != nil {
		return err
	}
	if !await(ctx, 20*time.Second, func() bool { return !m.exists(h) }) {
		return fmt.Errorf("QEMU of %s on host %s was killed but has not ended", m.name, h.Name)
	}
	return nil
}

// exists reports whether the machine has a QEMU on h, in whatever state.
func (m *machine) exists(h *lab.Host) bool {
	pid, err := m.qemu(h)
	return err != nil || pid != 0
}

// data returns how many bytes of the machine's memory on h are in pages that are not zero.
func (m *machine) data(h *lab.Host) (int64, error) {
	var n int64
	zeros := make([]byte, os.Getpagesize())
	for _, name := range m.config.RAMFiles() {
		ram, err := os.ReadFile(h.Path(m.path(name)))
		if err != nil {
			return 0, err
		}
		for page := range slices.Chunk(ram, len(zeros)) {
			if !bytes.Equal(page, zeros) {
				n += int64(len(page))
			}
		}
	}
	return n, nil
}
