// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/e2e/lab"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// A scene is two hosts and a VM that counts on host a.
type scene struct {
	*testing.T
	lab   *lab.Lab
	vm    lab.VMConfig
	began uint64 // a pass that the guest had written before the migration
}

// newScene uses the bare-metal guest under TCG: it boots at once and counts
// through all of its memory, so that nothing can be lost unseen. It drives none of its devices, but they move with it,
// and its disk must be given up at one host before the other has it.
func newScene(t *testing.T, l *lab.Lab) *scene {
	t.Helper()
	return sceneOf(t, l, lab.VMConfig{}.WithDevices(1, 1))
}

func (s *scene) spec() *migratedv1.MigrationSpec {
	return &migratedv1.MigrationSpec{Vm: lab.QMPPath, Destination: s.lab.B.DaemonAddr()}
}

// stillCounting is the end of every failure before the switch: the guest goes on at the source, and has run nowhere else.
func (s *scene) stillCounting() {
	s.Helper()
	s.countsAtTheSource()
	if pass, found := lastPass(s.lab.B.Path(lab.SerialLog)); found {
		s.Errorf("the guest counted on the destination, to pass %d", pass)
	}
}

// countsAtTheSource checks that the guest goes on there, and that no QEMU is left at the destination.
func (s *scene) countsAtTheSource() {
	s.Helper()
	s.countsOn()
	if qemu := qemuOn(s.T, s.lab.B); qemu != 0 {
		s.Errorf("QEMU process %d is left on the destination", qemu)
	}
}

// countsOn checks that the guest goes on at the source.
func (s *scene) countsOn() {
	s.Helper()
	now, found := lastPass(s.lab.A.Path(lab.SerialLog))
	if !found {
		s.Fatal("the guest's passes are gone")
	}
	metalPass(s.T, s.lab.A, func(pass uint64) bool { return pass > max(now, s.began)+1 })
	checkMetal(s.T, s.vm, s.lab.A)
}

// failed checks what both daemons say of a failed migration, and that the VM
// goes on.
func (s *scene) failed(m *migratedv1.Migration, state migratedv1.MigrationState, words ...string) {
	s.Helper()
	if m.GetState() != state {
		s.Fatalf("migration is %v instead of %v: %v", m.GetState(), state, m.GetError())
	}
	says := m.GetError().GetMessage() + "\n" + m.GetError().GetRemedy() + "\n" + m.GetError().GetVmStatus()
	for _, word := range words {
		if !strings.Contains(says, word) {
			s.Errorf("the reason does not say %q:\n%s", word, says)
		}
	}
	s.Logf("the source says: %s", says)
	s.stillCounting()
}

// destinationSays checks the reason that the destination's daemon shows.
func (s *scene) destinationSays(id, word string) {
	s.Helper()
	m := await(s.T, control(s.T, s.lab.B), id, func(*migratedv1.Migration) bool { return false })
	if m.GetState() != migratedv1.MigrationState_MIGRATION_STATE_FAILED || !strings.Contains(m.GetError().GetMessage(), word) {
		s.Errorf("the destination says %v, %q; wanted a word of %q", m.GetState(), m.GetError().GetMessage(), word)
	}
}

const (
	stateFailed    = migratedv1.MigrationState_MIGRATION_STATE_FAILED
	stateCancelled = migratedv1.MigrationState_MIGRATION_STATE_CANCELLED
	stateDevice    = migratedv1.MigrationState_MIGRATION_STATE_DEVICE
)

// TestFailureBeforeTheSwitch breaks the migration in every way that can be had
// from outside. One VM lives through all of it, and then migrates.
func TestFailureBeforeTheSwitch(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	outer := newScene(t, l)
	run := func(name string, test func(s *scene)) {
		t.Run(name, func(t *testing.T) {
			s := *outer
			s.T = t
			test(&s)
		})
	}

	run("cannot connect", func(s *scene) {
		spec := s.spec()
		spec.Destination = l.B.Addr + ":9"
		s.failed(migrateSpec(s.T, l.A, "unreachable", spec), stateFailed,
			"cannot be reached", spec.GetDestination(), "the VM was not touched")
	})
	run("wrong machine type", func(s *scene) {
		spec := s.spec()
		spec.DestinationTemplate = templatePath
		// Another chipset has no place for the VM's devices, and QEMU itself would refuse it first.
		const another = "pc-q35-7.1"
		s.template(fmt.Sprintf("{{range .Args}}{{if eq . \"q35\"}}%s{{else}}{{.}}{{end}}\n{{end}}", another))
		s.failed(migrateSpec(s.T, l.A, "machine", spec), stateFailed,
			"machine types differ", another, "the VM was not touched")
		s.destinationSays("machine", "machine types differ")
	})
	run("mismatching RAM size", func(s *scene) {
		small := s.vm
		small.MemoryMiB /= 2
		startVM(s.T, l.B, small, "-S", "-incoming", "defer")
		spec := s.spec()
		spec.DestinationQmp = lab.QMPPath
		s.failed(migrateSpec(s.T, l.A, "ram", spec), stateFailed, "RAM sizes differ", "ram0")
		s.destinationSays("ram", "RAM sizes differ")
	})
	run("device load error", func(s *scene) {
		s.template(templateWithoutMSIX)
		spec := s.spec()
		spec.DestinationTemplate = templatePath
		s.failed(migrateSpec(s.T, l.A, "devices", spec), stateFailed, "could not load the device state", "the VM runs on the source")
		s.destinationSays("devices", "could not load the device state")
	})
	run("cancelled while prepared", func(s *scene) {
		client := s.prepare("cancel-prepared")
		s.cancel(client, "cancel-prepared")
		m := await(s.T, client, "cancel-prepared", func(*migratedv1.Migration) bool { return false })
		s.failed(m, stateCancelled, "cancelled", "the VM was not touched")
	})
	run("cancelled while the destination QEMU hangs", func(s *scene) {
		client := s.freezeInDevice("cancel-device")
		s.cancel(client, "cancel-device")
		m := await(s.T, client, "cancel-device", func(*migratedv1.Migration) bool { return false })
		s.failed(m, stateCancelled, "cancelled", "the VM was not touched")
	})
	run("destination QEMU killed while prepared", func(s *scene) {
		client := s.prepare("kill-prepared")
		kill(s.T, qemuOn(s.T, l.B), syscall.SIGKILL)
		m := await(s.T, client, "kill-prepared", func(*migratedv1.Migration) bool { return false })
		s.failed(m, stateFailed, "QEMU is gone", "the VM was not touched")
	})
	run("destination QEMU killed while it hangs", func(s *scene) {
		client := s.freezeInDevice("kill-device")
		kill(s.T, qemuOn(s.T, l.B), syscall.SIGKILL)
		m := await(s.T, client, "kill-device", func(*migratedv1.Migration) bool { return false })
		s.failed(m, stateFailed, "destination QEMU", "the VM was not touched")
	})
	run("cable pulled while the destination QEMU hangs", func(s *scene) {
		client := s.freezeInDevice("cut-device")
		if err := l.SetCable(testContext(s.T), false); err != nil {
			s.Fatal(err)
		}
		m := await(s.T, client, "cut-device", func(*migratedv1.Migration) bool { return false })
		if err := l.SetCable(testContext(s.T), true); err != nil {
			s.Fatal(err)
		}
		s.destinationGone("cut-device")
		// The kernel may find out before the time is over.
		s.failed(m, stateFailed, "be reached", "the VM was not touched")
	})

	// After all of that the same VM still moves.
	t.Run("then it migrates", func(t *testing.T) {
		moveMetal(t, outer.vm, l.A, l.B)
	})
}

// TestDestinationDaemonKilledBeforeTheSwitch has a lab of its own, because
// what that daemon started outlives it.
func TestDestinationDaemonKilledBeforeTheSwitch(t *testing.T) {
	t.Parallel()
	l := newHosts(t)
	startDaemon(t, l.A)
	daemon := startDaemon(t, l.B)
	s := newScene(t, l)
	client := s.freezeInDevice("daemon")
	if err := daemon.Kill(); err != nil {
		t.Fatal(err)
	}
	m := await(t, client, "daemon", func(*migratedv1.Migration) bool { return false })
	if m.GetState() != stateFailed {
		t.Fatalf("migration is %v: %v", m.GetState(), m.GetError())
	}
	// Its QEMU can't run the VM: only a daemon with the migration's token would
	// tell it to.
	kill(t, qemuOn(t, l.B), syscall.SIGKILL)
	metalPass(t, l.A, func(pass uint64) bool { return pass > s.began+1 })
	checkMetal(t, s.vm, l.A)
}

// TestSourceDaemonStoppedBeforeTheSwitch ends the source's daemon in good order
// in the middle of a migration.
func TestSourceDaemonStoppedBeforeTheSwitch(t *testing.T) {
	t.Parallel()
	l := newHosts(t)
	daemon := startDaemon(t, l.A)
	startDaemon(t, l.B)
	s := newScene(t, l)
	s.freezeInDevice("stopped")
	if err := daemon.Stop(testContext(t)); err != nil {
		t.Fatal(err)
	}
	s.destinationGone("stopped")
	s.stillCounting()
}

const templatePath = lab.VMDir + "/template"

// templateWithoutMSIX gives the RNG of VMConfig.WithDevices no MSI-X, so that the destination cannot load its state. A
// device with another property is not among what is compared before.
const templateWithoutMSIX = `{{range .Args}}{{replace "virtio-rng-pci,id=rng,rng=random" "virtio-rng-pci,id=rng,rng=random,vectors=0" .}}
{{end}}`

func (s *scene) template(text string) {
	s.Helper()
	if err := os.WriteFile(s.lab.B.Path(templatePath), []byte(text), 0o644); err != nil {
		s.Fatal(err)
	}
}

// prepared brings a migration to where it waits for Start.
func (s *scene) prepared(id string, spec *migratedv1.MigrationSpec) *migratedv1.Migration {
	s.Helper()
	client := control(s.T, s.lab.A)
	if _, err := client.Prepare(testContext(s.T), &migratedv1.PrepareRequest{Id: id, Spec: spec}); err != nil {
		s.Fatal(err)
	}
	m := await(s.T, client, id, func(m *migratedv1.Migration) bool { return m.GetPrepared() })
	if !m.GetPrepared() {
		s.Fatalf("not prepared: %v", m)
	}
	return m
}

// prepare does so with a migration to host b, and returns what it can be started by.
func (s *scene) prepare(id string) migratedv1.ControlServiceClient {
	s.Helper()
	s.prepared(id, s.spec())
	return control(s.T, s.lab.A)
}

// freezeInDevice brings a migration to where the destination's QEMU, which is
// frozen, is to take the device state and does not: the source must not stop its
// VM for it.
func (s *scene) freezeInDevice(id string) migratedv1.ControlServiceClient {
	s.Helper()
	client := s.prepare(id)
	kill(s.T, qemuOn(s.T, s.lab.B), syscall.SIGSTOP)
	if _, err := client.Start(testContext(s.T), &migratedv1.StartRequest{Id: id}); err != nil {
		s.Fatal(err)
	}
	await(s.T, client, id, func(m *migratedv1.Migration) bool { return m.GetState() == stateDevice })
	return client
}

func (s *scene) cancel(client migratedv1.ControlServiceClient, id string) {
	s.Helper()
	if _, err := client.Cancel(testContext(s.T), &migratedv1.CancelRequest{Id: id}); err != nil {
		s.Fatal(err)
	}
}

// destinationGone waits until the destination has given the migration up.
func (s *scene) destinationGone(id string) {
	s.Helper()
	m := await(s.T, control(s.T, s.lab.B), id, func(*migratedv1.Migration) bool { return false })
	if m.GetState() != stateFailed {
		s.Errorf("the destination's migration is %v", m.GetState())
	}
}

// TestCancelAfterTheSwitch is refused.
func TestCancelAfterTheSwitch(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := newScene(t, l)
	migrate(t, l.A, l.B, "late")
	client := control(t, l.A)
	if _, err := client.Cancel(testContext(t), &migratedv1.CancelRequest{Id: "late"}); err != nil {
		t.Errorf("cancelling what is over must do nothing: %v", err)
	}
	_, err := client.Cancel(testContext(t), &migratedv1.CancelRequest{Id: "unheard-of"})
	if status.Code(err) != codes.NotFound {
		t.Errorf("cancelling what never was: %v", err)
	}
	metalPass(t, l.B, func(pass uint64) bool { return pass > s.began+1 })
}
