// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A module is a security module, by libvirt's name for it.
type module string

const (
	none     module = "none"
	selinux  module = "selinux"
	apparmor module = "apparmor"
)

// A host is a mount namespace with a /run and a /dev/shm of its own, and an address on loopback. That is enough to keep
// a daemon and a VM apart from those of the other host. One locked thread lives in the namespace and starts the host's
// processes.
type host struct {
	name, addr string
	root       string // the path of the host's files from outside
	work       chan func()
	module     module // the module that confines, once it has a policy
	libvirt    bool   // its VMs are libvirt's
	memory     memory
	processes  []*process
}

func newHost(name, addr string, by module, memory memory) (*host, error) {
	h := &host{name: name, addr: addr, work: make(chan func()), module: by, memory: memory}
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the host
		ready <- h.unshare()
		for f := range h.work {
			f()
		}
	}()
	if err := <-ready; err != nil {
		return nil, fmt.Errorf("host %s: %w", name, err)
	}
	return h, h.furnish()
}

// unshare gives the calling thread its namespace.
func (h *host) unshare() error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	h.root = fmt.Sprintf("/proc/self/task/%d/root", unix.Gettid())
	return errors.Join(
		unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=0755"),
		unix.Mount("tmpfs", "/dev/shm", "tmpfs", 0, "mode=1777"),
		unix.Mount("tmpfs", "/var/log", "tmpfs", 0, "mode=0755"))
}

// furnish makes the directories of the daemon and of the VM.
func (h *host) furnish() error {
	disk, err := os.ReadFile("/disk")
	if err != nil {
		return err
	}
	err = errors.Join(
		os.Mkdir(h.path(daemonDir), 0o755),
		os.Mkdir(h.path(vmDir), 0o755),
		os.WriteFile(h.path(vmDir+"/disk"), disk, 0o600),
		os.Chown(h.path(vmDir), qemuUser, qemuUser),
		os.Chown(h.path(vmDir+"/disk"), qemuUser, qemuUser))
	if err != nil || h.module != selinux {
		return err
	}
	return errors.Join(
		label(h.path("/run"), "object_r:var_run_t:s0"),
		label(h.path("/var/log"), "object_r:var_log_t:s0"),
		label(h.path(daemonDir), "object_r:migrated_runtime_t:s0"),
		label(h.path(vmDir), "object_r:svirt_runtime_t:s0"),
		label(h.path(vmDir+"/disk"), "object_r:svirt_image_t:"+categories))
}

// path returns the path of a file of the host, from outside of it.
func (h *host) path(path string) string { return filepath.Join(h.root, path) }

// do runs f on the host's thread.
func (h *host) do(f func() error) error {
	done := make(chan error)
	h.work <- func() { done <- f() }
	return <-done
}

// close ends what the host started, its QEMU, which the daemon may have started, and its thread.
func (h *host) close() {
	if pid := h.qemu(); pid != 0 {
		_ = unix.Kill(pid, unix.SIGKILL) // it may have ended
	}
	for _, p := range h.processes {
		p.kill()
	}
	close(h.work)
}

// A process runs on a host, and in a domain if there is a policy.
type process struct {
	cmd    *exec.Cmd
	said   output
	exited chan struct{}
	err    error // valid once exited is closed
}

// start starts a program of the host as that user, in that domain.
func (h *host) start(domain string, uid uint32, files []*os.File, argv ...string) (*process, error) {
	p := &process{cmd: exec.Command(argv[0], argv[1:]...), exited: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr, p.cmd.ExtraFiles = &p.said, &p.said, files
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if uid != 0 {
		p.cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uid, Gid: uid}
	}
	err := h.do(func() error {
		// What this thread asks for applies to the child's exec as well.
		const exec = "/proc/thread-self/attr/exec"
		switch {
		case h.module == selinux && domain != "":
			if err := os.WriteFile(exec, []byte(fullContext(domain)), 0); err != nil {
				return err
			}
			return errors.Join(p.cmd.Start(), os.WriteFile(exec, nil, 0))
		case h.module == apparmor:
			if err := os.WriteFile(exec, []byte("exec "+h.profileOn(domain)), 0); err != nil {
				return err
			}
		}
		return p.cmd.Start()
	})
	if err != nil {
		return nil, fmt.Errorf("start %s in %q on host %s: %w", argv[0], domain, h.name, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.exited)
	}()
	h.processes = append(h.processes, p)
	return p, nil
}

func (p *process) pid() int { return p.cmd.Process.Pid }

func (p *process) kill() {
	_ = p.cmd.Process.Kill() // it may have ended
	<-p.exited
}

// wait waits for the end and returns what the process said.
func (p *process) wait(ctx context.Context) (string, error) {
	select {
	case <-p.exited:
		return p.said.String(), p.err
	case <-ctx.Done():
		return p.said.String(), ctx.Err()
	}
}

// output keeps what a process writes.
type output struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return strings.TrimSpace(o.text.String())
}

// until polls for something that no event announces.
func until(ctx context.Context, what string, ok func() bool) error {
	for !ok() {
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", what, ctx.Err())
		case <-time.After(10 * time.Millisecond):
		}
	}
	return nil
}
