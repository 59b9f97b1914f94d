// SPDX-License-Identifier: Apache-2.0

// Package e2e migrates real VMs between two real daemons on two hosts made of
// namespaces, and looks at every page afterwards.
package e2e

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/lab"
	metalguest "github.com/migrated-vm/migrated/e2e/metal"
	"github.com/migrated-vm/migrated/internal/cannot"
	"github.com/migrated-vm/migrated/internal/qmp"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// patience bounds a test. Nothing waits that long unless it is broken.
const patience = 4 * time.Minute

// testContext ends with the test's patience.
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
	for _, h := range []*lab.Host{l.A, l.B} {
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
		cannot.Run(t, "hosts are made of namespaces, which needs root")
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
	for _, h := range []*lab.Host{l.A, l.B} {
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

// control is the control API of a host's daemon.
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

// startVM starts a VM, its QEMU's output shown when the test fails.
func startVM(t *testing.T, h *lab.Host, c lab.VMConfig, extra ...string) *lab.Process {
	t.Helper()
	beforeVM(t, h, c)
	p, err := h.StartVM(testContext(t), c, extra...)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// bootLinux starts a VM with the Linux guest and returns its port when that is at work.
func bootLinux(t *testing.T, h *lab.Host, c lab.VMConfig, log *report.Log) *report.Port {
	t.Helper()
	beforeVM(t, h, c)
	port, err := h.Boot(testContext(t), c, log)
	if err != nil {
		t.Fatal(err)
	}
	return port
}

// beforeVM says what a VM needs that this machine lacks, and shows at the end of a test that failed what its QEMU said.
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

// migrate moves the VM and returns the migration as its source shows it.
func migrate(t *testing.T, from, to *lab.Host, id string) *migratedv1.Migration {
	t.Helper()
	m := migrateSpec(t, from, id, &migratedv1.MigrationSpec{Vm: lab.QMPPath, Destination: to.DaemonAddr()})
	if m.GetState() != migratedv1.MigrationState_MIGRATION_STATE_COMPLETED {
		t.Fatalf("migration is %v: %v", m.GetState(), m.GetError())
	}
	return m
}

// migrateSpec starts a migration and follows it to its end.
func migrateSpec(t *testing.T, from *lab.Host, id string, spec *migratedv1.MigrationSpec) *migratedv1.Migration {
	t.Helper()
	client := control(t, from)
	if _, err := client.Start(testContext(t), &migratedv1.StartRequest{Id: id, Spec: spec}); err != nil {
		t.Fatal(err)
	}
	return await(t, client, id, func(m *migratedv1.Migration) bool { return false })
}

// await watches a migration until it is over or as wanted. No test has a process that touches the VM's memory, but
// those that follow.
func await(t *testing.T, client migratedv1.ControlServiceClient, id string, wanted func(*migratedv1.Migration) bool) *migratedv1.Migration {
	t.Helper()
	m := follow(t, client, id, wanted)
	if p := m.GetProgress(); p.GetPagesTouched() != 0 || p.GetPagesUnexplained() != 0 {
		t.Errorf("%d pages were there before they came, and %d more could not be written again",
			p.GetPagesTouched(), p.GetPagesUnexplained())
	}
	return m
}

// follow is await whatever other processes do.
func follow(t *testing.T, client migratedv1.ControlServiceClient, id string, wanted func(*migratedv1.Migration) bool) *migratedv1.Migration {
	t.Helper()
	stream, err := client.Watch(testContext(t), &migratedv1.WatchRequest{Id: id})
	if err != nil {
		t.Fatal(err)
	}
	var last *migratedv1.Migration
	for {
		answer, err := stream.Recv()
		if err != nil {
			if last == nil {
				t.Fatal(err)
			}
			switch last.GetState() {
			case migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, migratedv1.MigrationState_MIGRATION_STATE_FAILED,
				migratedv1.MigrationState_MIGRATION_STATE_CANCELLED, migratedv1.MigrationState_MIGRATION_STATE_REHEARSED,
				migratedv1.MigrationState_MIGRATION_STATE_ENDED:
				return last
			}
			t.Fatalf("watch ended in state %v: %v", last.GetState(), err)
		}
		if last = answer.GetMigration(); wanted(last) {
			return last
		}
	}
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

// metalPass waits for the bare-metal guest on h to write a pass that ok accepts
// and returns its number.
func metalPass(t *testing.T, h *lab.Host, ok func(pass uint64) bool) uint64 {
	t.Helper()
	ctx := testContext(t)
	path := h.Path(lab.SerialLog)
	for {
		if pass, found := lastPass(path); found && ok(pass) {
			return pass
		}
		select {
		case <-ctx.Done():
			text, _ := os.ReadFile(path)
			t.Fatalf("the guest on host %s does not count: %.200q", h.Name, text)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// goesOn waits for the bare-metal guest to write passes on that host, also while the daemon has its monitor.
func goesOn(t *testing.T, h *lab.Host) {
	t.Helper()
	now := metalPass(t, h, func(uint64) bool { return true })
	metalPass(t, h, func(pass uint64) bool { return pass > now+1 })
}

// lastPass reads the newest whole line of the bare-metal guest.
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

// qemuOn is the process of the host's only QEMU, 0 where there is none.
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

// kill signals a process of the lab.
func kill(t *testing.T, pid int, sig syscall.Signal) {
	t.Helper()
	if pid == 0 {
		t.Fatal("there is no process to signal")
	}
	if err := syscall.Kill(pid, sig); err != nil {
		t.Fatal(err)
	}
}

// checkMetal stops the bare-metal guest on h, reads all of its memory and lets
// it go on. It returns the pass that the memory is of.
func checkMetal(t *testing.T, vm lab.VMConfig, h *lab.Host) uint64 {
	t.Helper()
	client, err := h.QMP(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := client.Do(testContext(t), "stop", nil, nil); err != nil {
		t.Fatal(err)
	}
	result, err := metalguest.Verify(ramOf(t, client, vm, h)...)
	if err != nil {
		t.Errorf("memory on host %s: %v", h.Name, err)
	}
	if vm.VCPUs == 1 {
		checkPosition(t, client, vm, result)
	}
	if err := client.Do(testContext(t), "cont", nil, nil); err != nil {
		t.Fatal(err)
	}
	if err := client.Disconnect(); err != nil {
		t.Fatal(err)
	}
	return uint64(result.Pass)
}

// ramOf are the files with the RAM of the stopped VM on h: QEMU's own, or one that it saves it to.
func ramOf(t *testing.T, client *qmp.Client, vm lab.VMConfig, h *lab.Host) (files []string) {
	t.Helper()
	for _, file := range vm.RAMFiles() {
		files = append(files, h.Path(file))
	}
	if files != nil {
		return files
	}
	saved, err := h.SaveRAM(testContext(t), client, vm, lab.SavedRAM)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Remove(saved); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Error(err)
		}
	})
	return []string{saved}
}

// checkPosition compares memory with where the stopped guest is.
func checkPosition(t *testing.T, client *qmp.Client, vm lab.VMConfig, result metalguest.Result) {
	t.Helper()
	var text string
	if err := client.Do(testContext(t), "human-monitor-command", map[string]string{"command-line": "info registers"}, &text); err != nil {
		t.Fatal(err)
	}
	at, err := metalguest.ParseRegisters(text)
	if err != nil {
		t.Fatal(err)
	}
	end, err := metalguest.End(vm.MemoryMiB)
	if err != nil {
		t.Fatal(err)
	}
	if err := result.Meets(at, end); err != nil {
		t.Error(err)
	}
}

// awaitFile waits until a file exists.
func awaitFile(t *testing.T, path string) {
	t.Helper()
	ctx := testContext(t)
	for {
		if _, err := os.Stat(path); err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s does not appear", path)
		case <-time.After(10 * time.Millisecond):
		}
	}
}
