// SPDX-License-Identifier: Apache-2.0

// Package e2e migrates real VMs between two real daemons on two hosts made of namespaces, and then checks every page.
//
// What the tests share:
//
//	main_test.go       hosts, daemons, VMs, passes of the bare-metal guest; eventually, which polls
//	migration_test.go  one migration through the control API: start it, wait for it, check its end
//	scene_test.go      a VM with the bare-metal guest that moves from host A to host B
//	vms_test.go        VMs with a Linux guest; traveller_test.go: one that moves back and forth
//	badinput_test.go   operate, which runs the command line program
//	libvirt_test.go    libvirt domains; guides_test.go: the commands in the documentation
package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/pkg/testenv"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// patience limits each wait of a test. Nothing takes that long unless it is broken.
const patience = 4 * time.Minute

// testContext returns a context for one step of a test. It ends after patience, or with the test.
func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// newLab makes two hosts, each with its daemon. The daemons' logs are shown
// when the test fails.
func newLab(t *testing.T) *lab.Lab {
	t.Helper()
	l := newHosts(t)
	for _, h := range l.Hosts() {
		startDaemon(t, h)
	}
	return l
}

// newHosts makes two hosts without daemons.
func newHosts(t *testing.T) *lab.Lab {
	t.Helper()
	return joinedHosts(t, lab.New)
}

// linkedHosts makes two hosts without daemons, with an emulated network between them.
func linkedHosts(t *testing.T, link lab.Link) *lab.Lab {
	t.Helper()
	return joinedHosts(t, func(ctx context.Context) (*lab.Lab, error) { return lab.NewWithLink(ctx, link) })
}

func joinedHosts(t *testing.T, join func(context.Context) (*lab.Lab, error)) *lab.Lab {
	t.Helper()
	if os.Getuid() != 0 {
		testenv.CannotRun(t, "hosts are made of namespaces, which needs root")
	}
	l, err := join(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("end of the lab: %v", err)
		}
	})
	for _, h := range l.Hosts() {
		if err := h.MakeVMDir(); err != nil {
			t.Fatal(err)
		}
	}
	return l
}

func startDaemon(t *testing.T, h *lab.Host, extra ...string) *lab.Process {
	t.Helper()
	log, err := os.CreateTemp(t.TempDir(), "daemon-"+h.Name)
	if err != nil {
		t.Fatal(err)
	}
	daemon, err := h.StartDaemon(testContext(t), log, extra...)
	t.Cleanup(func() {
		if t.Failed() {
			text, _ := os.ReadFile(log.Name())
			t.Logf("daemon of host %s:\n%s", h.Name, text)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return daemon
}

// control returns a client of the control API of a host's daemon.
func control(t *testing.T, h *lab.Host) migratedv1.ControlServiceClient {
	t.Helper()
	conn, client, err := h.Control()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeConn(t, conn) })
	return client
}

func closeConn(t *testing.T, conn *grpc.ClientConn) {
	if err := conn.Close(); err != nil {
		t.Errorf("close the connection: %v", err)
	}
}

// startVM starts a VM. If the test fails, it shows QEMU's output.
func startVM(t *testing.T, h *lab.Host, c lab.VMConfig, extra ...string) *lab.Process {
	t.Helper()
	beforeVM(t, h, c)
	p, err := h.StartVM(testContext(t), c, extra...)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// bootLinux starts a VM with the Linux guest and returns the guest's port once the guest works.
func bootLinux(t *testing.T, h *lab.Host, c lab.VMConfig, log *report.Log, extra ...string) *report.Port {
	t.Helper()
	beforeVM(t, h, c)
	port, err := h.Boot(testContext(t), c, log, extra...)
	if err != nil {
		t.Fatal(err)
	}
	return port
}

// beforeVM calls testenv.CannotRun if this machine lacks what the VM needs. If the test fails, it shows QEMU's output.
func beforeVM(t *testing.T, h *lab.Host, c lab.VMConfig) {
	t.Helper()
	if c.Disks > 0 || c.NICs > 0 {
		needRealVM(t)
	}
	t.Cleanup(func() {
		if t.Failed() {
			text, _ := os.ReadFile(h.Path(lab.VMDir + "/qemu.log"))
			t.Logf("QEMU on host %s: %s", h.Name, text)
		}
	})
}

// openGuest opens the Linux guest's reports on a host.
func openGuest(t *testing.T, h *lab.Host, log *report.Log) *report.Port {
	t.Helper()
	port, err := h.Guest(testContext(t), log)
	if err != nil {
		t.Fatal(err)
	}
	return port
}

// metalPass waits until the bare-metal guest on h has written a pass that ok accepts, and returns its number.
func metalPass(t *testing.T, h *lab.Host, ok func(pass uint64) bool) uint64 {
	t.Helper()
	return passIn(t, h.Path(lab.SerialLog), ok)
}

// passIn is metalPass for the file at path, to which the guest's serial port is written.
func passIn(t *testing.T, path string, ok func(pass uint64) bool) (pass uint64) {
	t.Helper()
	eventually(t, func() error {
		var found bool
		if pass, found = lastPass(path); !found || !ok(pass) {
			text, _ := os.ReadFile(path)
			return fmt.Errorf("the guest does not count in %s: %.200q", path, text)
		}
		return nil
	})
	return pass
}

// goesOn waits until the bare-metal guest on a host has written more passes. It does not use QEMU's monitor, so it also
// works while the daemon does.
func goesOn(t *testing.T, h *lab.Host) {
	t.Helper()
	now := metalPass(t, h, func(uint64) bool { return true })
	metalPass(t, h, func(pass uint64) bool { return pass > now+1 })
}

// lastPass returns the pass in the last complete line that the bare-metal guest wrote to path.
func lastPass(path string) (uint64, bool) {
	text, err := os.ReadFile(filepath.Clean(path))
	if err != nil {
		return 0, false
	}
	lines := strings.Split(string(text), "\n")
	if len(lines) < 2 {
		return 0, false
	}
	var pass uint64
	if _, err := fmt.Sscanf(strings.TrimSpace(lines[len(lines)-2]), "%x", &pass); err != nil {
		return 0, false
	}
	return pass, true
}

// qemuOn returns the pid of the host's only QEMU, or 0 if the host has none.
func qemuOn(t *testing.T, h *lab.Host) int {
	t.Helper()
	pids, err := h.Processes("qemu-system-x86_64")
	if err != nil {
		t.Fatal(err)
	}
	switch len(pids) {
	case 0:
		return 0
	case 1:
		return pids[0]
	default:
		t.Fatalf("host %s has QEMU processes %v", h.Name, pids)
		return 0
	}
}

// awaitNoQEMU waits until a host has no QEMU.
func awaitNoQEMU(t *testing.T, h *lab.Host) {
	t.Helper()
	eventually(t, func() error {
		if pid := qemuOn(t, h); pid != 0 {
			return fmt.Errorf("QEMU process %d is left on host %s", pid, h.Name)
		}
		return nil
	})
}

// kill sends a signal to a process of the lab.
func kill(t *testing.T, pid int, sig syscall.Signal) {
	t.Helper()
	if pid == 0 {
		t.Fatal("there is no process to signal")
	}
	if err := syscall.Kill(pid, sig); err != nil {
		t.Fatal(err)
	}
}

// checkMetal stops the bare-metal guest on h, checks all of its memory and continues it. It returns the pass that the
// memory holds.
func checkMetal(t *testing.T, vm lab.VMConfig, h *lab.Host) uint64 {
	t.Helper()
	ctx := testContext(t)
	client, err := h.QMP(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := client.Do(ctx, "stop", nil, nil); err != nil {
		t.Fatal(err)
	}
	result, err := h.VerifyMetal(ctx, client, vm, nil)
	if err != nil {
		t.Error(err)
	}
	if err := errors.Join(client.Do(ctx, "cont", nil, nil), client.Disconnect()); err != nil {
		t.Fatal(err)
	}
	return uint64(result.Pass)
}

// awaitFile waits until a file exists.
func awaitFile(t *testing.T, path string) {
	t.Helper()
	eventually(t, func() error {
		_, err := os.Stat(path)
		return err
	})
}

// eventually calls wrong until it returns nil. After patience, the test fails with the last error.
func eventually(t *testing.T, wrong func() error) {
	t.Helper()
	const firstPause, longestPause = 5 * time.Millisecond, 50 * time.Millisecond
	ctx := testContext(t)
	for pause := firstPause; ; pause = min(2*pause, longestPause) {
		err := wrong()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("not within %v: %v", patience, err)
		case <-time.After(pause):
		}
	}
}
