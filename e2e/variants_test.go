// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/e2e/lab"
)

// TestAttachToWaitingQEMU migrates, by the operator's command, into a QEMU that an orchestrator started. The source's
// QEMU ends.
func TestAttachToWaitingQEMU(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := newScene(t, l)
	startVM(t, l.B, s.vm, "-S", "-incoming", "defer")
	out, code := operate(t, l.A, "migrate", "--vm", lab.QMPPath, "--to", l.B.DaemonAddr(),
		"--to-qmp", lab.QMPPath, "--id", "attach")
	if code != 0 {
		t.Fatalf("exit code %d:\n%s", code, out)
	}
	s.arrived()
	awaitNoQEMU(t, l.A)
}

// TestAttachToRunningVMIsRefused names a destination QEMU that runs another VM. The migration fails, and both VMs
// continue unharmed.
func TestAttachToRunningVMIsRefused(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := newScene(t, l)
	occupant := s.vm
	occupant.Disks, occupant.NICs = 0, 0 // the VM's own are in use
	startVM(t, l.B, occupant)
	pass := metalPass(t, l.B, func(pass uint64) bool { return pass >= 2 })
	spec := s.spec()
	spec.DestinationQmp = lab.QMPPath
	m := migrateSpec(t, l.A, "occupied", spec)
	if m.GetState() != stateFailed || !strings.Contains(m.GetError().GetMessage(), "instead of waiting for a migration") {
		t.Errorf("migration is %v: %v", m.GetState(), m.GetError())
	}
	for _, h := range l.Hosts() {
		now := metalPass(t, h, func(uint64) bool { return true })
		metalPass(t, h, func(p uint64) bool { return p > max(now, pass)+1 })
		checkMetal(t, s.vm, h)
	}
}

// TestTemplate gives the destination another command line by a template: its RAM is in a file of another name.
func TestTemplate(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := newScene(t, l)
	const ram = "memory-backend-file,id=ram0,size=32M,mem-path=/dev/shm/guest-ram0,share=on"
	if !slices.Contains(s.vm.Args(), ram) {
		t.Fatalf("the VM's command line has changed: %q", s.vm.Args())
	}
	s.writeTemplate(fmt.Sprintf("{{range .Args}}{{if eq . %q}}%s{{else}}{{.}}{{end}}\n{{end}}",
		ram, strings.Replace(ram, "guest-ram0", "elsewhere", 1)))
	out, code := operate(t, l.A, "migrate", "--vm", lab.QMPPath, "--to", l.B.DaemonAddr(), "--template", templatePath)
	if code != 0 {
		t.Fatalf("exit code %d:\n%s", code, out)
	}
	s.countsAtDestination()
	if _, err := l.B.Allocated("/dev/shm/elsewhere"); err != nil {
		t.Error(err)
	}
}

// TestPausedVMStaysPaused moves a paused VM. It stays paused at the destination until its operator continues it.
func TestPausedVMStaysPaused(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := newScene(t, l)
	command(t, l.A, "stop")
	migrate(t, l.A, l.B, "paused")
	if status := vmStatus(t, l.B); status != "paused" {
		t.Errorf("the VM is %q on the destination", status)
	}
	s.notAtDestination()
	command(t, l.B, "cont")
	s.arrived()
}

// TestKeepSource: with KeepSource, the stopped QEMU stays at the source. The daemon refuses to migrate it as if it were
// the VM, also after a restart.
func TestKeepSource(t *testing.T) {
	t.Parallel()
	l := newHosts(t)
	daemon := startDaemon(t, l.A)
	startDaemon(t, l.B)
	s := newScene(t, l)
	spec := s.spec()
	spec.KeepSource = true
	if m := migrateSpec(t, l.A, "keep", spec); m.GetState() != stateCompleted {
		t.Fatal(m)
	}
	if status := vmStatus(t, l.A); status != "paused" {
		t.Errorf("the VM that was left is %q", status)
	}
	s.arrived()
	refused := func(id string) {
		t.Helper()
		m := migrateSpec(t, l.A, id, s.spec())
		if says := m.GetError().GetMessage(); m.GetState() != stateFailed ||
			!strings.Contains(says, "was handed over to "+l.B.DaemonAddr()) {
			t.Errorf("migration is %v: %s", m.GetState(), says)
		}
	}
	refused("again")
	if err := daemon.Stop(testContext(t)); err != nil {
		t.Error(err)
	}
	startDaemon(t, l.A)
	// The daemon took the migration up. It is under way until the daemon has asked the destination about it.
	awaitEnd(t, control(t, l.A), "keep")
	refused("once-more")
	s.countsAtDestination()
}

// TestPrepareThenStart prepares a migration, which takes time, and starts it later. The VM runs meanwhile. A repeated
// Start succeeds.
func TestPrepareThenStart(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := newScene(t, l)
	client := s.prepare("later")
	goesOn(t, l.A)
	for range 2 {
		start(t, client, "later", nil)
	}
	checkFigures(t, completed(t, awaitEnd(t, client, "later")))
	s.arrived()
}

// TestSparseGuestStaysSparse: pages that the guest never touched are neither sent nor allocated at the destination.
func TestSparseGuestStaysSparse(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	// Without a disk the firmware finds nothing to boot and touches little.
	vm := lab.VMConfig{VCPUs: 1, MemoryMiB: 1024, Nodes: 1}
	startVM(t, l.A, emptyDisk(t, vm))
	before, err := l.A.Allocated(vm.RAMFiles()[0])
	if err != nil {
		t.Fatal(err)
	}
	m := migrate(t, l.A, l.B, "sparse")
	after, err := l.B.Allocated(vm.RAMFiles()[0])
	if err != nil {
		t.Fatal(err)
	}
	if after > 2*before+(4<<20) {
		t.Errorf("%d bytes of RAM became %d", before, after)
	}
	if wire := m.GetProgress().GetBytesOnWire(); wire > uint64(2*before+(4<<20)) {
		t.Errorf("%d bytes of RAM took %d on the wire", before, wire)
	}
}

// TestCutAfterTheSwitch pulls the cable while pages are still missing. The guest waits for its pages, nothing is lost,
// and the migration continues by itself when the cable is back.
func TestCutAfterTheSwitch(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := largeScene(t, l, 1)
	s.moveHalfway("cut")
	s.cable(true)
	checkFigures(t, completed(t, awaitEnd(t, control(t, l.A), "cut")))
	s.arrived()
}

// command runs a QMP command without arguments.
func command(t *testing.T, h *lab.Host, name string) json.RawMessage {
	t.Helper()
	client, err := h.QMP(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	var result json.RawMessage
	if err := client.Do(testContext(t), name, nil, &result); err != nil {
		t.Fatal(err)
	}
	if err := client.Disconnect(); err != nil {
		t.Fatal(err)
	}
	return result
}

func vmStatus(t *testing.T, h *lab.Host) string {
	t.Helper()
	var state struct {
		Status string `json:"status"`
	}
	if err := json.Unmarshal(command(t, h, "query-status"), &state); err != nil {
		t.Fatal(err)
	}
	return state.Status
}

// emptyDisk gives c a disk that nothing boots from.
func emptyDisk(t *testing.T, c lab.VMConfig) lab.VMConfig {
	t.Helper()
	c.Disk = t.TempDir() + "/empty"
	if err := os.WriteFile(c.Disk, []byte(strings.Repeat("\x00", 1<<20)), 0o644); err != nil {
		t.Fatal(err)
	}
	return c
}
