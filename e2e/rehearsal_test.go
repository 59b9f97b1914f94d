// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"slices"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/e2e/lab"
)

// expectedDifferences are the devices whose state must differ when the destination saves it again.
var expectedDifferences = []string{
	"mc146818rtc", // its clock goes on
}

// TestRehearsal makes a migration without the commit. The VM continues on its host, nothing is left at the destination,
// and the VM can then be migrated.
func TestRehearsal(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := newScene(t, l)
	out, code := operate(t, l.A, "migrate", "--vm", lab.QMPPath, "--to", l.B.DaemonAddr(), "--id", "dress", "--rehearse")
	if code != 0 || !strings.Contains(out, "rehearsed: the VM would stand still for") {
		t.Fatalf("exit code %d:\n%s", code, out)
	}
	m := get(t, l.A, "dress")
	r := m.GetRehearsal()
	if m.GetState() != stateRehearsed ||
		r.GetBytesDeviceState() == 0 || r.GetBytesMemory() < 32<<20 {
		t.Errorf("migration %v", m)
	}
	if r.GetDowntime().AsDuration() < r.GetSaveTime().AsDuration()+r.GetTransferTime().AsDuration() ||
		r.GetLoadTime().AsDuration() <= 0 {
		t.Errorf("figures %v", r)
	}
	for _, d := range r.GetDifferences() {
		if !slices.Contains(expectedDifferences, d.GetDevice()) {
			t.Errorf("the state of %s is another when it is saved again: %d bytes", d.GetDevice(), d.GetBytes())
		}
	}
	s.stillCounting()
	if out, _ := operate(t, l.A, "status", "dress"); !strings.Contains(out, "It would stand still") ||
		!strings.Contains(out, "rehearsed: ") {
		t.Errorf("status says:\n%s", out)
	}
	s.destinationGone("dress")
	if pid := qemuOn(t, l.B); pid != 0 {
		t.Errorf("process %d is left at the destination", pid)
	}
	migrate(t, l.A, l.B, "premiere")
	s.arrived()
}

// TestRehearsalOfPausedVM checks that a paused VM stays paused and keeps its disks.
func TestRehearsalOfPausedVM(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := newScene(t, l)
	command(t, l.A, "stop")
	spec := s.spec()
	spec.Rehearse = true
	if m := migrateSpec(t, l.A, "dress", spec); m.GetState() != stateRehearsed {
		t.Fatalf("migration %v", m)
	}
	if status := vmStatus(t, l.A); status != "paused" {
		t.Errorf("the VM is %q", status)
	}
	migrate(t, l.A, l.B, "premiere")
	command(t, l.B, "cont")
	s.arrived()
}
