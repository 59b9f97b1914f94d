// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// The addresses of the two hosts. They exist only in the hosts' namespaces.
const (
	addrA = "10.77.0.1"
	addrB = "10.77.0.2"
)

// Lab is two hosts, A and B, with a cable between them, and a third host, C, for the VMs' clients.
type Lab struct {
	A, B *Host
	// C is the host of the VMs' clients. It is nil until a VM with network cards was started.
	C *Host
	// AB carries packets from A to B, BA from B to A. Both are nil without a [Link].
	AB, BA *Wire

	networks []int       // numbers of the networks of the VMs' cards
	taps     []string    // tap devices that both hosts have
	storage  string      // the directory of SharedDir, and of each host's LocalDir
	starts   chan func() // commands are started by one thread that lives as long as the lab
	closers  []func() error
}

// New makes the two hosts, joined by the kernel's own virtual cable. It needs
// root.
func New(ctx context.Context) (*Lab, error) {
	return newLab(func(l *Lab) error { return l.cable(ctx) })
}

func newLab(join func(*Lab) error) (_ *Lab, err error) {
	l := &Lab{starts: make(chan func())}
	// Pdeathsig applies when the thread that started a process ends, and the runtime
	// may end threads at any time. So one locked thread starts all processes.
	go func() {
		runtime.LockOSThread()
		for start := range l.starts {
			start()
		}
	}()
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	if err := l.makeStorage(); err != nil {
		return nil, err
	}
	if l.A, err = l.newHost("a", addrA); err != nil {
		return nil, err
	}
	if l.B, err = l.newHost("b", addrB); err != nil {
		return nil, err
	}
	return l, join(l)
}

// Hosts returns A and B.
func (l *Lab) Hosts() []*Host { return []*Host{l.A, l.B} }

// Other returns B if h is A, and otherwise A.
func (l *Lab) Other(h *Host) *Host {
	if h == l.A {
		return l.B
	}
	return l.A
}

// cable joins the two network namespaces by a pair of virtual interfaces.
func (l *Lab) cable(ctx context.Context) error {
	a, b := strconv.Itoa(l.A.PID()), strconv.Itoa(l.B.PID())
	if _, err := l.A.Run(
		ctx, "ip", "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", b,
	); err != nil {
		return fmt.Errorf("cable between %s and %s: %w", a, b, err)
	}
	return l.plug(ctx)
}

// plug sets the addresses of the two ends of the cable and brings them up.
func (l *Lab) plug(ctx context.Context) error {
	for _, h := range l.Hosts() {
		if _, err := h.Run(ctx, "ip", "addr", "add", h.Addr+"/24", "dev", "cable"); err != nil {
			return err
		}
	}
	return l.SetCable(ctx, true)
}

// SetCable plugs the cable in (up) or pulls it.
func (l *Lab) SetCable(ctx context.Context, up bool) error {
	state := map[bool]string{true: "up", false: "down"}[up]
	for _, h := range l.Hosts() {
		if _, err := h.Run(ctx, "ip", "link", "set", "cable", state); err != nil {
			return err
		}
	}
	return nil
}

// Close ends everything that the lab started, in reverse order.
func (l *Lab) Close() error {
	var errs []error
	for _, closer := range slices.Backward(l.closers) {
		errs = append(errs, closer())
	}
	l.closers = nil
	for _, h := range []*Host{l.A, l.B, l.C} {
		if h == nil {
			continue
		}
		errs = append(errs, h.endAll())
	}
	close(l.starts)
	if l.storage != "" {
		errs = append(errs, os.RemoveAll(l.storage))
	}
	return errors.Join(errs...)
}

func (l *Lab) onClose(f func() error) { l.closers = append(l.closers, f) }

func (l *Lab) startLocked(cmd *exec.Cmd) error {
	result := make(chan error)
	l.starts <- func() { result <- cmd.Start() }
	return <-result
}

// Processes returns the pids of the host's processes, which are those in its
// network namespace. If program is not empty, it returns only processes whose
// program has that base name. The process that holds the namespaces open is not
// among them.
func (h *Host) Processes(program string) ([]int, error) {
	namespace, err := os.Readlink(h.ns("net"))
	if err != nil {
		return nil, fmt.Errorf("network namespace of host %s: %w", h.Name, err)
	}
	links, err := filepath.Glob("/proc/[0-9]*/ns/net")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, link := range links {
		if other, err := os.Readlink(link); err != nil || other != namespace {
			continue // a process of another host, or one that has ended
		}
		pid, err := strconv.Atoi(strings.Split(link, "/")[2])
		if err != nil || pid == h.PID() {
			continue
		}
		exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
		if program == "" || err == nil && filepath.Base(exe) == program {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// endAll ends the host's processes. These include the ones that its daemon
// started and, as it should, left running.
func (h *Host) endAll() error {
	pids, err := h.Processes("")
	errs := []error{err}
	for _, pid := range pids {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("end process %d on host %s: %w", pid, h.Name, err))
		}
	}
	errs = append(errs, h.anchor.Process.Kill())
	_ = h.anchor.Wait() // it was killed
	return errors.Join(errs...)
}
