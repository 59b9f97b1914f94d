// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/migrated-vm/migrated/e2e/metal"
	"github.com/migrated-vm/migrated/internal/qmp"
)

const (
	vmDir      = "/run/vm"
	qmpPath    = vmDir + "/qmp.sock"
	eventsPath = vmDir + "/events.sock"
	ramPath    = "/dev/shm/guest-ram0"
	ramMiB     = 64

	// qemuUser is the user of the VMs, which are not root's.
	qemuUser = 107
)

// qemuArgs returns the command line of the VM: one KVM vCPU, its memory, the bare-metal guest's disk, and a serial port
// that writes to a file.
func qemuArgs(memory memory) []string {
	return slices.Concat([]string{
		"/usr/bin/qemu-system-x86_64", "-name", "guest,debug-threads=on", "-nodefaults", "-no-user-config",
		"-display", "none", "-accel", "kvm", "-cpu", "qemu64", "-smp", "1", "-m", fmt.Sprintf("%dM", ramMiB),
		"-chardev", "file,id=serial,path=" + vmDir + "/serial.log,append=on", "-serial", "chardev:serial",
		"-drive", "file=" + vmDir + "/disk,format=raw,if=none,id=boot", "-device", "ide-hd,drive=boot,bus=ide.0",
	}, monitorArgs(), memory.args())
}

func monitorArgs() []string {
	return []string{
		"-qmp", "unix:" + qmpPath + ",server=on,wait=off",
		"-qmp", "unix:" + eventsPath + ",server=on,wait=off", // the daemon has the other
	}
}

// startQEMU starts the VM's QEMU on the host and waits for its QMP socket.
func (h *host) startQEMU(ctx context.Context, extra ...string) (*process, error) {
	if err := h.clear(); err != nil {
		return nil, err
	}
	p, err := h.start(qemuDomain, qemuUser, nil, append(qemuArgs(h.memory), extra...)...)
	if err != nil {
		return nil, err
	}
	err = until(ctx, "QEMU's QMP socket", func() bool {
		client, err := qmp.Dial(ctx, h.path(qmpPath))
		if err == nil {
			err = client.Disconnect()
		}
		return err == nil || p.ended()
	})
	if err == nil && p.ended() {
		err = fmt.Errorf("QEMU ended: %w", p.err)
	}
	if err != nil {
		return nil, fmt.Errorf("host %s: %w: %s", h.name, err, p.said.String())
	}
	return p, nil
}

// startIncoming starts the QEMU that an orchestrator would start for a VM that arrives.
func (h *host) startIncoming(ctx context.Context) (*process, error) {
	return h.startQEMU(ctx, "-S", "-incoming", "defer")
}

func (p *process) ended() bool {
	select {
	case <-p.exited:
		return true
	default:
		return false
	}
}

// pass returns the newest pass that the guest on this host wrote to its serial port; 0 if it wrote none.
func (h *host) pass() uint32 {
	text, err := os.ReadFile(h.path(vmDir + "/serial.log"))
	if err != nil {
		return 0
	}
	lines := strings.Split(string(text), "\n")
	if len(lines) < 2 {
		return 0
	}
	n, err := metal.Pass(lines[len(lines)-2])
	if err != nil {
		return 0
	}
	return n
}

// astray is longer than any guest takes for a pass, unless it went astray.
const astray = 3 * time.Minute

// countsBeyond waits until the guest on this host has written a later pass.
func (h *host) countsBeyond(ctx context.Context, pass uint32) error {
	ctx, cancel := context.WithTimeout(ctx, astray)
	defer cancel()
	return until(
		ctx, fmt.Sprintf("the guest on host %s, which stands at pass %d, to count beyond %d", h.name, h.pass(), pass),
		func() bool { return h.pass() > pass },
	)
}

// countsOn waits for two passes from now, because one may have been on its way.
func (h *host) countsOn(ctx context.Context) error { return h.countsBeyond(ctx, h.pass()+1) }

// verify stops the guest, compares all its memory with what it wrote up to its position, and lets it go on.
func (h *host) verify(ctx context.Context) (metal.Result, error) {
	client, err := qmp.Dial(ctx, h.path(qmpPath))
	if err != nil {
		return metal.Result{}, err
	}
	defer client.Disconnect() //nolint:errcheck // all was said
	if err := client.Do(ctx, "stop", nil, nil); err != nil {
		return metal.Result{}, err
	}
	ram, err := h.ram(ctx, client)
	if err != nil {
		return metal.Result{}, err
	}
	result, err := metal.Verify(ram)
	if err != nil {
		return result, err
	}
	var registers string
	if err := client.Do(
		ctx, "human-monitor-command", map[string]string{"command-line": "info registers"}, &registers,
	); err != nil {
		return result, err
	}
	at, err := metal.ParseRegisters(registers)
	if err != nil {
		return result, err
	}
	end, err := metal.End(ramMiB)
	if err != nil {
		return result, err
	}
	if err := result.Meets(at, end); err != nil {
		return result, err
	}
	return result, client.Do(ctx, "cont", nil, nil)
}

// qemu returns the PID of the host's only QEMU, also if the daemon started it; 0 without one.
func (h *host) qemu() int {
	listens, err := os.Stat(h.path(qmpPath))
	if err != nil {
		return 0
	}
	links, _ := filepath.Glob("/proc/[0-9]*/exe") // the pattern is right
	for _, link := range links {
		dir := filepath.Dir(link)
		exe, err := os.Readlink(link)
		if err != nil || filepath.Base(exe) != "qemu-system-x86_64" {
			continue
		}
		seen, err := os.Stat(dir + "/root" + qmpPath)
		if err != nil || !os.SameFile(listens, seen) {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(dir)); err == nil {
			return pid
		}
	}
	return 0
}

// vcpuWaits waits until the thread of the VM's KVM vCPU sleeps in a page fault that a userfaultfd is to resolve.
func vcpuWaits(ctx context.Context, pid int) error {
	names, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/comm", pid))
	if err != nil {
		return err
	}
	for _, name := range names {
		comm, err := os.ReadFile(name)
		if err != nil || strings.TrimSpace(string(comm)) != "CPU 0/KVM" {
			continue
		}
		var where []byte
		err = until(ctx, "the vCPU to fault", func() bool {
			where, _ = os.ReadFile(filepath.Join(filepath.Dir(name), "wchan")) // empty while it runs
			return string(where) == "handle_userfault"
		})
		logf("thread %s, CPU 0/KVM, sleeps in %s", filepath.Base(filepath.Dir(name)), where)
		return err
	}
	return fmt.Errorf("process %d has no thread of a KVM vCPU", pid)
}

// resumed waits until QEMU on this host, which may not have been started yet, runs the VM. The daemon uses the other
// socket.
func (h *host) resumed(ctx context.Context) error {
	var client *qmp.Client
	if err := until(ctx, "QEMU's second QMP socket", func() bool {
		var err error
		client, err = qmp.Dial(ctx, h.path(eventsPath))
		return err == nil
	}); err != nil {
		return err
	}
	defer client.Disconnect() //nolint:errcheck // it was only read from
	events := client.Subscribe("RESUME")
	var status struct{ Status string }
	if err := client.Do(ctx, "query-status", nil, &status); err != nil || status.Status == "running" {
		return err
	}
	select {
	case _, ok := <-events.Events():
		if !ok {
			return fmt.Errorf("QEMU on host %s ended before it ran the VM: %w", h.name, client.Err())
		}
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// clear removes what an earlier QEMU left on the host.
func (h *host) clear() error {
	for _, path := range []string{ramPath, qmpPath, eventsPath, vmDir + "/serial.log"} {
		if err := os.Remove(h.path(path)); err != nil && !os.IsNotExist(err) {
			return err
		}
	}
	return nil
}
