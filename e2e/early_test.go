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

// loadedEarly checks that the destination loaded the devices' state before the VM stopped, and that only little of it
// changed afterwards.
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

// TestEarlyLoad checks that devices that change between the early load and the stop arrive in their last state. One of
// them is the LPC bridge of a q35, which has the APM status port: QEMU by itself does not load it twice.
func TestEarlyLoad(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	// QEMU redraws a screen that a VNC client may show, and reads video memory for it.
	shown := append(lab.EventsArgs(), "-vnc", "unix:"+lab.VMDir+"/vnc.sock")
	s := sceneOf(t, l, lab.VMConfig{Extra: shown}.WithDevices(2, 2))
	for _, rehearse := range []bool{true, false} {
		spec, id := s.spec(), "move"
		if spec.Rehearse = rehearse; rehearse {
			id = "dress"
		}
		prepare(s.T, control(s.T, s.lab.A), id, spec)
		goesOn(t, l.A)
		ask(t, l.A, "human-monitor-command", map[string]string{"command-line": fmt.Sprintf("o /b 0xb3 %d", 66+len(id))}, nil)
		m := s.startPrepared(id)
		loadedEarly(t, m)
		for _, d := range m.GetRehearsal().GetDifferences() {
			if !slices.Contains(expectedDifferences, d.GetDevice()) {
				t.Errorf("the state of %s is another when it is saved again: %d bytes", d.GetDevice(), d.GetBytes())
			}
		}
		want := stateCompleted
		if rehearse {
			want = stateRehearsed
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

// TestEarlyLoadOff checks that the early load can be switched off, and that there is none if the destination's QEMU
// could not be replaced.
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
	pass := s.arrivedAfter(l.B, s.began)
	startVM(t, l.A, s.vm, "-S", "-incoming", "defer")
	m := completed(t, migrateSpec(t, l.B, "back", &migratedv1.MigrationSpec{
		Vm: lab.QMPPath, Destination: l.A.DaemonAddr(), DestinationQmp: lab.QMPPath,
	}))
	if early := m.GetEarlyLoad(); early.GetLoaded() || !strings.Contains(early.GetReason(), "could not be replaced") {
		t.Errorf("early load %v", early)
	}
	s.arrivedAfter(l.A, pass)
}

// TestPausedSinceEarlyLoad pauses the VM after the early load. QEMU was told that the VM will run, and would activate
// its disks only then.
func TestPausedSinceEarlyLoad(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := sceneOf(t, l, lab.VMConfig{Extra: lab.EventsArgs()}.WithDevices(1, 1))
	if early := prepare(s.T, control(s.T, s.lab.A), "paused", s.spec()).GetEarlyLoad(); !early.GetLoaded() {
		t.Fatalf("early load %v", early)
	}
	ask(t, l.A, "stop", nil, nil)
	m := s.startPrepared("paused")
	said := m.GetError()
	if m.GetState() != stateFailed || !strings.Contains(said.GetMessage(), "was paused after") ||
		said.GetRemedy() != "migrate it again" ||
		said.GetVmStatus() != "the VM was not touched; the VM is paused on the source" {
		t.Errorf("migration is %v: %v", m.GetState(), said)
	}
	completed(t, migrateSpec(t, l.A, "again", s.spec()))
	command(t, l.B, "cont")
	s.arrived()
}

// TestEarlyLoadThatFails: if the destination's QEMU cannot load the early state, it is replaced, and the VM stops only
// for the save. The new QEMU has the same device without MSI-X, so it cannot load at the stop either, and the VM
// continues at the source.
func TestEarlyLoadThatFails(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := newScene(t, l)
	s.writeTemplate(templateWithoutMSIX)
	spec := s.spec()
	spec.DestinationTemplate = templatePath
	early := prepare(s.T, control(s.T, s.lab.A), "other", spec).GetEarlyLoad()
	if early.GetLoaded() || !strings.Contains(early.GetReason(), "virtio-rng") {
		t.Errorf("early load %v", early)
	}
	goesOn(t, l.A)
	m := s.startPrepared("other")
	s.failed(m, stateFailed, "could not load the device state", "virtio-rng", "the VM runs on the source")
	if err := os.Remove(l.B.Path(templatePath)); err != nil {
		t.Error(err)
	}
}
