// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/e2e/lab"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// TestFailureBeforeTheSwitch breaks migrations in every way that is possible from outside. The same VM survives all of
// them, and can then be migrated.
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
		// Another version of the same chipset. QEMU itself would refuse another chipset first, because that has no
		// place for the VM's devices.
		const another = "pc-q35-7.1"
		s.writeTemplate(fmt.Sprintf("{{range .Args}}{{if eq . \"q35\"}}%s{{else}}{{.}}{{end}}\n{{end}}", another))
		s.failed(migrateSpec(s.T, l.A, "machine", spec), stateFailed,
			"machine types differ", another, "the VM was not touched")
		s.destinationSays("machine", "machine types differ")
	})
	run("mismatching RAM size", func(s *scene) {
		small := s.vm
		small.MemoryMiB /= 2
		waiting := startVM(s.T, l.B, small, "-S", "-incoming", "defer")
		spec := s.spec()
		spec.DestinationQmp = lab.QMPPath
		m := migrateSpec(s.T, l.A, "ram", spec)
		s.destinationSays("ram", "RAM sizes differ")
		if qemuOn(s.T, l.B) == 0 {
			s.Error("the QEMU that was refused has ended, and may be another VM's")
		}
		if err := waiting.Kill(); err != nil {
			s.Fatal(err)
		}
		s.failed(m, stateFailed, "RAM sizes differ", "ram0")
	})
	run("device load error", func(s *scene) {
		s.writeTemplate(templateWithoutMSIX)
		spec := s.spec()
		spec.DestinationTemplate = templatePath
		s.failed(migrateSpec(s.T, l.A, "devices", spec), stateFailed,
			"could not load the device state", "the VM runs on the source")
		s.destinationSays("devices", "could not load the device state")
	})
	run("cancelled while prepared", func(s *scene) {
		client := s.prepare("cancel-prepared")
		cancel(s.T, client, "cancel-prepared")
		m := awaitEnd(s.T, client, "cancel-prepared")
		s.failed(m, stateCancelled, "cancelled", "the VM was not touched")
	})
	run("cancelled while the destination QEMU hangs", func(s *scene) {
		client := s.freezeInDevice("cancel-device")
		cancel(s.T, client, "cancel-device")
		m := awaitEnd(s.T, client, "cancel-device")
		s.failed(m, stateCancelled, "cancelled", "the VM was not touched")
	})
	run("destination QEMU killed while prepared", func(s *scene) {
		client := s.prepare("kill-prepared")
		kill(s.T, qemuOn(s.T, l.B), syscall.SIGKILL)
		m := awaitEnd(s.T, client, "kill-prepared")
		s.failed(m, stateFailed, "QEMU is gone", "the VM was not touched")
	})
	run("destination QEMU killed while it hangs", func(s *scene) {
		client := s.freezeInDevice("kill-device")
		kill(s.T, qemuOn(s.T, l.B), syscall.SIGKILL)
		m := awaitEnd(s.T, client, "kill-device")
		s.failed(m, stateFailed, "destination QEMU", "the VM was not touched")
	})
	run("cable pulled while the destination QEMU hangs", func(s *scene) {
		client := s.freezeInDevice("cut-device")
		s.cable(false)
		m := awaitEnd(s.T, client, "cut-device")
		s.cable(true)
		s.destinationGone("cut-device")
		// The kernel may report the broken connection before the daemon's timeout. Both errors have these words.
		s.failed(m, stateFailed, "be reached", "the VM was not touched")
	})

	// After all of these failures, the same VM can still be moved.
	t.Run("then it migrates", func(t *testing.T) {
		moveMetal(t, outer.vm, l.A, l.B)
	})
}

// TestDestinationDaemonKilledBeforeTheSwitch kills the destination's daemon: the VM continues at the source. The test
// has a lab of its own, because the QEMU that the daemon started outlives it.
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
	m := awaitEnd(t, client, "daemon")
	if m.GetState() != stateFailed {
		t.Fatalf("migration is %v: %v", m.GetState(), m.GetError())
	}
	// The QEMU that is left cannot run the VM: only a daemon with the migration's token would tell it to.
	kill(t, qemuOn(t, l.B), syscall.SIGKILL)
	s.countsAtSource()
}

// TestSourceDaemonStoppedBeforeTheSwitch stops the source's daemon gracefully in the middle of a migration: the
// destination gives up, and the VM continues at the source.
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

// TestCancelAfterTheSwitch: once the VM is handed over, cancelling is refused and changes nothing. Cancelling a
// migration that is over does nothing, and an id that no migration has is not found.
func TestCancelAfterTheSwitch(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := largeScene(t, l, 1)
	client := s.moveSlowly("late")
	_, err := client.Cancel(testContext(t), &migratedv1.CancelRequest{Id: "late"})
	if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "handed over") {
		t.Errorf("cancelling a migration whose VM is handed over: %v", err)
	}
	inFlight(t, "late", l.B)
	if m := get(t, l.A, "late"); m.GetState() != stateActive ||
		m.GetLocation() != migratedv1.Location_LOCATION_DESTINATION {
		t.Errorf("migration is %v, the VM %v: %v", m.GetState(), m.GetLocation(), m.GetError())
	}
	unlimit(t, client, "late")
	completed(t, awaitEnd(t, client, "late"))
	if _, err := client.Cancel(testContext(t), &migratedv1.CancelRequest{Id: "late"}); err != nil {
		t.Errorf("cancelling what is over must do nothing: %v", err)
	}
	_, err = client.Cancel(testContext(t), &migratedv1.CancelRequest{Id: "unheard-of"})
	if status.Code(err) != codes.NotFound {
		t.Errorf("cancelling what never was: %v", err)
	}
	s.arrived()
}
