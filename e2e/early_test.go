// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/e2e/lab"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// loadedEarly wants a migration whose destination has loaded the devices' state before the VM stopped, and what has
// changed since to be little of it.
func loadedEarly(t *testing.T, m *migratedv1.Migration) {
	t.Helper()
	early := m.GetEarlyLoad()
	if !early.GetLoaded() || early.GetPause().AsDuration() <= 0 || early.GetLoadTime().AsDuration() <= 0 {
		t.Fatalf("the devices' state was not loaded early: %v", early)
	}
	if changes := m.GetProgress().GetBytesDeviceState(); changes == 0 || changes > early.GetBytes()/4 {
		t.Errorf("%d bytes of %d were loaded when the VM had stopped", changes, early.GetBytes())
	}
	t.Logf("early load: %v; then %d bytes, downtime %v", early, m.GetProgress().GetBytesDeviceState(),
		m.GetProgress().GetDowntime().AsDuration())
}

// begun starts a migration that was prepared, and returns how it ended.
func (s *scene) begun(id string) *migratedv1.Migration {
	s.Helper()
	client := control(s.T, s.lab.A)
	if _, err := client.Start(testContext(s.T), &migratedv1.StartRequest{Id: id}); err != nil {
		s.Fatal(err)
	}
	return await(s.T, client, id, func(*migratedv1.Migration) bool { return false })
}

// TestEarlyLoad: devices that change between the early load and the stop arrive as they are then: also the one of a
// q35 that QEMU does not load twice by itself, the LPC bridge, which has the APM status port.
func TestEarlyLoad(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	// QEMU redraws a screen that somebody may look at, and reads video memory for it.
	shown := append(lab.EventsArgs(), "-vnc", "unix:"+lab.VMDir+"/vnc.sock")
	s := sceneOf(t, l, lab.VMConfig{Extra: shown}.WithDevices(2, 2))
	for _, rehearse := range []bool{true, false} {
		spec, id := s.spec(), "move"
		if spec.Rehearse = rehearse; rehearse {
			id = "dress"
		}
		s.prepared(id, spec)
		goesOn(t, l.A)
		ask(t, l.A, "human-monitor-command", map[string]string{"command-line": fmt.Sprintf("o /b 0xb3 %d", 66+len(id))}, nil)
		m := s.begun(id)
		loadedEarly(t, m)
		for _, d := range m.GetRehearsal().GetDifferences() {
			if !slices.Contains(another, d.GetDevice()) {
				t.Errorf("the state of %s is another when it is saved again: %d bytes", d.GetDevice(), d.GetBytes())
			}
		}
		want := migratedv1.MigrationState_MIGRATION_STATE_COMPLETED
		if rehearse {
			want = migratedv1.MigrationState_MIGRATION_STATE_REHEARSED
		}
		if m.GetState() != want {
			t.Fatalf("migration is %v: %v", m.GetState(), m.GetError())
		}
	}
	s.arrived()
	var port string
	ask(t, l.B, "human-monitor-command", map[string]string{"command-line": "i /b 0xb3"}, &port)
	if want := fmt.Sprintf("= %#x", 66+len("move")); !strings.Contains(port, want) {
		t.Errorf("the APM status port has %q, want %q", port, want)
	}
}

// TestEarlyLoadOff: it can be switched off, and is not done where the destination's QEMU could not be replaced.
func TestEarlyLoadOff(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := newScene(t, l)
	out, code := operate(t, l.A, "migrate", "--vm", lab.QMPPath, "--to", l.B.DaemonAddr(), "--id", "there",
		"--no-early-load")
	if code != 0 {
		t.Fatalf("exit code %d:\n%s", code, out)
	}
	early := get(t, l.A, "there").GetEarlyLoad()
	if early.GetLoaded() || early.GetPause().AsDuration() != 0 || early.GetReason() != "it was switched off" {
		t.Errorf("early load %v", early)
	}
	s.arrived()
	startVM(t, l.A, s.vm, "-S", "-incoming", "defer")
	m := migrateSpec(t, l.B, "back", &migratedv1.MigrationSpec{
		Vm: lab.QMPPath, Destination: l.A.DaemonAddr(), DestinationQmp: lab.QMPPath,
	})
	if m.GetState() != migratedv1.MigrationState_MIGRATION_STATE_COMPLETED {
		t.Fatalf("migration is %v: %v", m.GetState(), m.GetError())
	}
	if early := m.GetEarlyLoad(); early.GetLoaded() || !strings.Contains(early.GetReason(), "could not be replaced") {
		t.Errorf("early load %v", early)
	}
}

// TestPausedSinceEarlyLoad: QEMU was told that the VM will run, and would leave its disks to that.
func TestPausedSinceEarlyLoad(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := sceneOf(t, l, lab.VMConfig{Extra: lab.EventsArgs()}.WithDevices(1, 1))
	if early := s.prepared("paused", s.spec()).GetEarlyLoad(); !early.GetLoaded() {
		t.Fatalf("early load %v", early)
	}
	ask(t, l.A, "stop", nil, nil)
	m := s.begun("paused")
	said := m.GetError()
	if m.GetState() != stateFailed || !strings.Contains(said.GetMessage(), "was paused after") ||
		said.GetRemedy() != "migrate it again" || said.GetVmStatus() != "the VM was not touched; the VM is paused on the source" {
		t.Errorf("migration is %v: %v", m.GetState(), said)
	}
	if m := migrateSpec(t, l.A, "again", s.spec()); m.GetState() != migratedv1.MigrationState_MIGRATION_STATE_COMPLETED {
		t.Fatalf("migration is %v: %v", m.GetState(), m.GetError())
	}
	command(t, l.B, "cont")
	s.arrived()
}

// TestEarlyLoadThatFails: a destination whose QEMU cannot load what it is given is replaced, and the VM stops only for
// the save. One without a device does not load at the stop either, and then the VM goes on.
func TestEarlyLoadThatFails(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := newScene(t, l)
	s.template(templateWithoutMSIX)
	spec := s.spec()
	spec.DestinationTemplate = templatePath
	early := s.prepared("other", spec).GetEarlyLoad()
	if early.GetLoaded() || !strings.Contains(early.GetReason(), "virtio-rng") {
		t.Errorf("early load %v", early)
	}
	goesOn(t, l.A)
	s.failed(s.begun("other"), stateFailed, "could not load the device state", "virtio-rng", "the VM runs on the source")
	if err := os.Remove(l.B.Path(templatePath)); err != nil {
		t.Error(err)
	}
}
