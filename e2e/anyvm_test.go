// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/e2e/emulator"
	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/image"
	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qmp"
	"github.com/migrated-vm/migrated/pkg/testenv"
)

// inspect attaches to the QEMU of the host's VM by its second monitor, because the daemon uses the first. It detaches
// when the test ends.
func inspect(t *testing.T, h *lab.Host) *qemu.VM {
	t.Helper()
	vm, err := qemu.Attach(testContext(t), h.Path(lab.EventsPath))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := vm.Close(); err != nil {
			t.Error(err)
		}
	})
	return vm
}

// ask runs a QMP command on the VM's second monitor.
func ask(t *testing.T, h *lab.Host, command string, args, result any) {
	t.Helper()
	client, err := qmp.Dial(testContext(t), h.Path(lab.EventsPath))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(client.Do(testContext(t), command, args, result), client.Disconnect()); err != nil {
		t.Fatal(err)
	}
}

// TestPausedVMWithDiskGoesOn moves a paused VM with writable disks back and forth several times. A QEMU that did not
// get its disks would abort when it has to give them up.
func TestPausedVMWithDiskGoesOn(t *testing.T) {
	t.Parallel()
	for _, version := range lab.QEMUVersions {
		t.Run(version, func(t *testing.T) {
			l := newHosts(t)
			for _, h := range l.Hosts() {
				useQEMU(t, h, version)
				startDaemon(t, h)
			}
			s := sceneOf(t, l, lab.VMConfig{Backend: lab.BackendDefault}.WithDevices(2, 1))
			command(t, l.A, "stop")
			from, to := l.A, l.B
			for hop := range 4 {
				migrate(t, from, to, fmt.Sprintf("hop-%d", hop))
				if status := vmStatus(t, to); status != "paused" {
					t.Fatalf("hop %d: the VM is %q", hop, status)
				}
				from, to = to, from
			}
			command(t, from, "cont")
			metalPass(t, from, func(pass uint64) bool { return pass > s.began+1 })
			checkMetal(t, s.vm, from)
		})
	}
}

// TestPausedVMThatDoesNotLoad checks that a paused VM whose state does not load stays paused and can be moved.
func TestPausedVMThatDoesNotLoad(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := sceneOf(t, l, lab.VMConfig{Backend: lab.BackendDefault}.WithDevices(1, 1))
	command(t, l.A, "stop")
	s.writeTemplate(templateWithoutMSIX)
	spec := s.spec()
	spec.DestinationTemplate = templatePath
	for _, id := range []string{"first", "second"} { // before the second, the VM has given up its disks once
		m := migrateSpec(t, l.A, id, spec)
		if m.GetState() != stateFailed || !strings.Contains(m.GetError().GetVmStatus(), "paused on the source") {
			t.Errorf("migration is %v: %v", m.GetState(), m.GetError())
		}
		if status := vmStatus(t, l.A); status != "paused" {
			t.Errorf("the VM is %q", status)
		}
		// This VM is the only copy: check must not tell the operator to use another host.
		out, code := operate(t, l.A, "check", "--vm", lab.QMPPath)
		if code != 0 || !strings.Contains(out, `the VM is "paused"`) ||
			strings.Contains(strings.Join(strings.Fields(out), " "), "from the host on which it runs") {
			t.Errorf("check: exit code %d, it must find a paused VM that can be moved:\n%s", code, out)
		}
	}
	migrate(t, l.A, l.B, "third")
	command(t, l.B, "cont")
	s.arrived()
}

// useQEMU gives a host a version of QEMU.
func useQEMU(t *testing.T, h *lab.Host, version string) {
	t.Helper()
	if version != lab.InstalledQEMU {
		if _, err := emulator.Dir(testContext(t), version); err != nil {
			testenv.CannotRun(t, "%v", err)
		}
	}
	if err := h.UseQEMU(testContext(t), version); err != nil {
		t.Fatal(err)
	}
}

// TestNewerQEMU moves a VM of an old machine type to a newer QEMU: from 7.2 to 10.0 and to 11.1, and from 10.0 to 11.1.
func TestNewerQEMU(t *testing.T) {
	t.Parallel()
	for _, versions := range [][2]string{{"7.2", "10.0"}, {"7.2", "11.1"}, {"10.0", "11.1"}} {
		t.Run(versions[0]+" to "+versions[1], func(t *testing.T) {
			l := newHosts(t)
			for i, h := range l.Hosts() {
				useQEMU(t, h, versions[i])
				startDaemon(t, h)
			}
			s := sceneOf(t, l, lab.VMConfig{
				Backend: lab.BackendDefault, Extra: []string{"-machine", "pc-q35-7.2"},
			}.WithDevices(2, 2))
			checkVersion(t, l.A, versions[0])
			migrate(t, l.A, l.B, "newer")
			checkVersion(t, l.B, versions[1])
			s.arrived()
		})
	}
}

// TestOlderQEMU checks that a QEMU without the VM's machine type is detected before the VM is touched.
func TestOlderQEMU(t *testing.T) {
	t.Parallel()
	l := newHosts(t)
	for h, version := range map[*lab.Host]string{l.A: "10.0", l.B: "7.2"} {
		useQEMU(t, h, version)
		startDaemon(t, h)
	}
	s := sceneOf(t, l, lab.VMConfig{Backend: lab.BackendDefault, Extra: []string{"-machine", "pc-q35-10.0"}})
	s.refusedByBoth(nil, []string{"unsupported machine type"})
	s.stillCounting()
}

// TestManyDevices moves a VM with eight disks and eight network cards, each behind a port of its own. The guest uses
// all of them.
func TestManyDevices(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	kernel, initrd, err := image.LinuxWithVirtio(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	var guest report.Log
	port := bootLinux(
		t, l.A, lab.RealVM(kernel, initrd, 256, 8, 8, "migrated.mem=64", "migrated.workers=1", "migrated.rate=500"), &guest,
	)
	from, to := l.A, l.B
	for hop := range 2 {
		awaitBlocks(t, &guest, writesOf(guest.Disks())+20)
		if err := port.Close(); err != nil {
			t.Fatal(err)
		}
		m := migrate(t, from, to, fmt.Sprintf("hop-%d", hop))
		port = openGuest(t, to, &guest)
		awaitBlocks(t, &guest, writesOf(guest.Disks())+20)
		verifyLinux(t, &guest, port)
		t.Logf("downtime %v, %d bytes of device state",
			m.GetProgress().GetDowntime().AsDuration(), m.GetProgress().GetBytesDeviceState())
		from, to = to, from
	}
	if err := port.Close(); err != nil {
		t.Error(err)
	}
}

// TestFreePageHints: a VM whose balloon has free-page-hint can be moved. QEMU's own migration, which saves the devices'
// state without the RAM, crashed with such a balloon.
func TestFreePageHints(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	vm := lab.VMConfig{Extra: []string{
		"-object", "iothread,id=io", "-device", "virtio-balloon-pci,free-page-hint=on,iothread=io",
	}}.WithDevices(1, 1)
	vm.Balloon = false // Extra has it
	s := sceneOf(t, l, vm)
	migrate(t, l.A, l.B, "hints")
	s.arrived()
}

// TestSnapshotMeanwhile checks that a snapshot made while a migration is prepared contains the VM's memory.
func TestSnapshotMeanwhile(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := newScene(t, l)
	client := s.prepare("prepared")
	var said string
	ask(t, l.A, "human-monitor-command", map[string]string{"command-line": "savevm snap"}, &said)
	if said != "" {
		t.Fatalf("savevm: %s", said)
	}
	var drives []struct {
		Inserted *struct {
			Image struct {
				Snapshots []struct {
					Name string `json:"name"`
					Size int64  `json:"vm-state-size"`
				} `json:"snapshots"`
			} `json:"image"`
		} `json:"inserted"`
	}
	ask(t, l.A, "query-block", nil, &drives)
	var size int64 // of the VM's state, which is in one of the drives
	for _, d := range drives {
		if d.Inserted != nil {
			for _, snapshot := range d.Inserted.Image.Snapshots {
				size = max(size, snapshot.Size)
			}
		}
	}
	if size < 1<<20 {
		t.Errorf("the snapshot holds %d bytes of the VM", size)
	}
	cancel(t, client, "prepared")
	awaitEnd(t, client, "prepared")
	s.stillCounting()
}

// TestUnmovableDevices: devices whose state QEMU cannot move are named before the VM is touched, because a save would
// silently leave them out.
func TestUnmovableDevices(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := sceneOf(t, l, lab.VMConfig{Backend: lab.BackendDefault, Extra: []string{
		"-drive", "if=none,id=nvm,file=null-co://,format=raw,file.size=64M", "-device", "nvme,drive=nvm,serial=1",
	}}.WithDevices(1, 1))
	s.failed(migrateSpec(t, l.A, "nvme", s.spec()), stateFailed, "nvme", "unplug the device", "the VM was not touched")
}

// TestGenerationIDStays: the guest of a VM that has moved is told the same generation id, also if QEMU has made it.
func TestGenerationIDStays(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := sceneOf(t, l, lab.VMConfig{Extra: []string{"-device", "vmgenid,guid=auto"}})
	before := string(command(t, l.A, "query-vm-generation-id"))
	migrate(t, l.A, l.B, "generation")
	s.arrived()
	if after := string(command(t, l.B, "query-vm-generation-id")); after != before {
		t.Errorf("the generation id was %s and is %s", before, after)
	}
}
