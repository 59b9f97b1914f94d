// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/migrated-vm/migrated/e2e/lab"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// scene is two hosts, and on host A a VM whose guest writes pass after pass.
type scene struct {
	*testing.T
	lab   *lab.Lab
	vm    lab.VMConfig
	began uint64 // a pass that the guest had written before the migration
}

// newScene makes a scene with the bare-metal guest under TCG. The guest boots at once and writes all of its memory over
// and over, so that a lost page is always noticed. It uses none of its devices, but they move with it, and the source
// must release the disk before the destination opens it.
func newScene(t *testing.T, l *lab.Lab) *scene {
	t.Helper()
	return sceneOf(t, l, lab.VMConfig{}.WithDevices(1, 1))
}

// spec returns the specification of a migration to host B.
func (s *scene) spec() *migratedv1.MigrationSpec {
	return &migratedv1.MigrationSpec{Vm: lab.QMPPath, Destination: s.lab.B.DaemonAddr()}
}

// sceneOf is newScene for another VM, which gets one vCPU and at least 32 MiB.
func sceneOf(t *testing.T, l *lab.Lab, vm lab.VMConfig) *scene {
	t.Helper()
	vm.VCPUs, vm.MemoryMiB = 1, max(32, vm.MemoryMiB)
	vm = metal(t, vm)
	startVM(t, l.A, vm, lab.EventsArgs()...)
	return &scene{T: t, lab: l, vm: vm, began: metalPass(t, l.A, func(pass uint64) bool { return pass >= 2 })}
}

// largeScene makes a scene with 1 GiB of memory in that many NUMA nodes. Its migrations take long enough for a test to
// act in the middle of one.
func largeScene(t *testing.T, l *lab.Lab, nodes int) *scene {
	t.Helper()
	return sceneOf(t, l, lab.VMConfig{MemoryMiB: 1024, Nodes: nodes}.WithDevices(1, 1))
}

// templatePath is the path at a destination of a template of QEMU's command line.
const templatePath = lab.VMDir + "/template"

// templateWithoutMSIX gives the RNG of VMConfig.WithDevices no MSI-X, so that the destination cannot load its state.
// The comparison before the migration does not notice this, because it ignores such properties of devices.
const templateWithoutMSIX = `{{range .Args}}` +
	`{{replace "virtio-rng-pci,id=rng,rng=random" "virtio-rng-pci,id=rng,rng=random,vectors=0" .}}
{{end}}`

// writeTemplate writes a template to host B.
func (s *scene) writeTemplate(text string) {
	s.Helper()
	if err := os.WriteFile(s.lab.B.Path(templatePath), []byte(text), 0o644); err != nil {
		s.Fatal(err)
	}
}

// prepare prepares the migration of the VM to host B, and returns the client that can start it.
func (s *scene) prepare(id string) migratedv1.ControlServiceClient {
	s.Helper()
	client := control(s.T, s.lab.A)
	prepare(s.T, client, id, s.spec())
	return client
}

// freezeInDevice stops the destination's QEMU with SIGSTOP before it loads the device state, and starts the migration.
// The source must not stop its VM while that QEMU hangs.
func (s *scene) freezeInDevice(id string) migratedv1.ControlServiceClient {
	s.Helper()
	client := s.prepare(id)
	kill(s.T, qemuOn(s.T, s.lab.B), syscall.SIGSTOP)
	start(s.T, client, id, nil)
	awaitState(s.T, client, id, stateDevice)
	return client
}

// destinationGone waits until the migration has failed at the destination.
func (s *scene) destinationGone(id string) {
	s.Helper()
	m := awaitEnd(s.T, control(s.T, s.lab.B), id)
	if m.GetState() != stateFailed {
		s.Errorf("the destination's migration is %v", m.GetState())
	}
}

// moveSlowly starts a migration and returns when the VM runs at the destination. A bandwidth limit keeps most of a
// large VM's memory at the source for at least ten seconds, however fast the machine is.
func (s *scene) moveSlowly(id string) migratedv1.ControlServiceClient {
	s.Helper()
	return s.moveSlowlyWith(id, s.spec())
}

// moveSlowlyWith is moveSlowly with another specification.
func (s *scene) moveSlowlyWith(id string, spec *migratedv1.MigrationSpec) migratedv1.ControlServiceClient {
	s.Helper()
	client := control(s.T, s.lab.A)
	spec.Bandwidth = 4 << 20
	start(s.T, client, id, spec)
	m := awaitState(s.T, client, id, stateActive)
	if m.GetLocation() != migratedv1.Location_LOCATION_DESTINATION {
		s.Fatalf("migration is %v, the VM %v: %v", m.GetState(), m.GetLocation(), m.GetError())
	}
	return client
}

// moveHalfway starts a migration and pulls the cable when the VM runs at the destination with a part of its memory.
// When the cable is plugged in again, the rest comes at full speed.
func (s *scene) moveHalfway(id string) *migratedv1.Migration {
	s.Helper()
	return s.moveHalfwayWith(id, s.spec())
}

// moveHalfwayWith is moveHalfway with another specification.
func (s *scene) moveHalfwayWith(id string, spec *migratedv1.MigrationSpec) *migratedv1.Migration {
	s.Helper()
	s.moveSlowlyWith(id, spec)
	there := control(s.T, s.lab.B)
	await(s.T, there, id, func(m *migratedv1.Migration) bool { return m.GetProgress().GetBytesOnWire() > 0 })
	s.cable(false)
	paused := awaitState(s.T, there, id, statePaused)
	if p := paused.GetProgress(); p.GetPagesPresent() == p.GetPagesTotal() {
		s.Fatalf("all was over before the cable was pulled: %v", paused)
	}
	unlimit(s.T, there, id)
	return paused
}

// cable plugs the cable between the hosts in, or pulls it.
func (s *scene) cable(up bool) {
	s.Helper()
	if err := s.lab.SetCable(testContext(s.T), up); err != nil {
		s.Fatal(err)
	}
}

// startPrepared starts a migration that was prepared, and returns how it ended.
func (s *scene) startPrepared(id string) *migratedv1.Migration {
	s.Helper()
	client := control(s.T, s.lab.A)
	start(s.T, client, id, nil)
	return awaitEnd(s.T, client, id)
}

// stillCounting checks the outcome of every failure before the switch: the guest continues at the source, and has not
// run at the destination.
func (s *scene) stillCounting() {
	s.Helper()
	s.countsAtSourceAlone()
	s.notAtDestination()
}

// notAtDestination checks that the guest has written no pass at the destination.
func (s *scene) notAtDestination() {
	s.Helper()
	if pass, found := lastPass(s.lab.B.Path(lab.SerialLog)); found {
		s.Errorf("the guest counted on the destination, to pass %d", pass)
	}
}

// countsAtSourceAlone checks that the guest continues at the source, and that no QEMU is left at the destination.
func (s *scene) countsAtSourceAlone() {
	s.Helper()
	s.countsAtSource()
	if qemu := qemuOn(s.T, s.lab.B); qemu != 0 {
		s.Errorf("QEMU process %d is left on the destination", qemu)
	}
}

// countsAtSource checks that the guest continues at the source and that its memory is correct.
func (s *scene) countsAtSource() {
	s.Helper()
	now, found := lastPass(s.lab.A.Path(lab.SerialLog))
	if !found {
		s.Fatal("the guest's passes are gone")
	}
	metalPass(s.T, s.lab.A, func(pass uint64) bool { return pass > max(now, s.began)+1 })
	checkMetal(s.T, s.vm, s.lab.A)
}

// failed checks what the source says of a migration that failed before the switch, and that the VM continues there.
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
	m := awaitEnd(s.T, control(s.T, s.lab.B), id)
	if m.GetState() != stateFailed || !strings.Contains(m.GetError().GetMessage(), word) {
		s.Errorf("the destination says %v, %q; wanted a word of %q", m.GetState(), m.GetError().GetMessage(), word)
	}
}

// arrived checks that the guest continues at the destination, and that none of its memory is lost.
func (s *scene) arrived() {
	s.Helper()
	s.countsAtDestination()
	if pass := checkMetal(s.T, s.vm, s.lab.B); pass < s.began {
		s.Errorf("memory is of pass %d, the guest had written %d before", pass, s.began)
	}
}

// arrivedAfter is arrived for a VM that moved to a host after pass before. The host may have had the VM earlier. It
// returns the pass that the memory holds.
func (s *scene) arrivedAfter(h *lab.Host, before uint64) uint64 {
	s.Helper()
	metalPass(s.T, h, func(pass uint64) bool { return pass > before+1 })
	pass := checkMetal(s.T, s.vm, h)
	if pass <= before {
		s.Errorf("memory on host %s is of pass %d, the guest was in pass %d before", h.Name, pass, before)
	}
	return pass
}

// countsAtDestination waits until the guest has written passes at the destination.
func (s *scene) countsAtDestination() {
	s.Helper()
	metalPass(s.T, s.lab.B, func(pass uint64) bool { return pass > s.began+1 })
}
