// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"testing"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/internal/qmp"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// hugePagesFor512 is how many pages of 2 MiB the two hosts need for a VM of 512 MiB.
const hugePagesFor512 = 512 // 2 hosts x 512 MiB / 2 MiB

// TestLinuxGuest migrates a Linux guest under load. The guest works on at the destination, and then checks every page
// of its memory and every block of its disk. Some cases migrate it back, or reset it at the end.
func TestLinuxGuest(t *testing.T) {
	idle := []string{"migrated.pattern=idle", "migrated.mem=300"}
	busy := []string{"migrated.pattern=random", "migrated.write=80", "migrated.mem=300"}
	for _, c := range []struct {
		name  string
		vm    lab.VMConfig
		args  []string
		back  bool
		reset bool // at the end, on the host where the VM is
	}{
		{"idle 4KiB 1 block 1 vCPU", lab.VMConfig{VCPUs: 1, Nodes: 1}, idle, false, true},
		{"busy 4KiB 1 block 4 vCPUs and back", lab.VMConfig{VCPUs: 4, Nodes: 1}, busy, true, false},
		{"busy 2MiB 1 block 4 vCPUs and back", lab.VMConfig{VCPUs: 4, Nodes: 1, HugePages: true}, busy, true, false},
		{"busy 4KiB 2 blocks 1 vCPU unprivileged and back", lab.VMConfig{VCPUs: 1, Nodes: 2, Unprivileged: true},
			busy, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.vm.MemoryMiB = 512
			if c.vm.HugePages {
				uffdtest.ReserveHugePages(t, hugePagesFor512)
			}
			vm := linux(t, c.vm, append(c.args, "migrated.workers=2")...)
			l := newLab(t)
			var guest report.Log
			port := bootLinux(t, l.A, vm, &guest)
			moveLinux(t, &guest, port, l.A, l.B)
			at := l.B
			if c.back {
				port = openGuest(t, l.B, &guest)
				moveLinux(t, &guest, port, l.B, l.A)
				at = l.A
			}
			if c.reset {
				resets(t, at)
			}
		})
	}
}

// resets resets a migrated VM, and with it each of its devices. QEMU continues, and the VM boots again.
func resets(t *testing.T, h *lab.Host) {
	t.Helper()
	systemReset(t, h, lab.QMPPath)
	var afresh report.Log
	port := openGuest(t, h, &afresh)
	_, err := afresh.WaitReady(testContext(t))
	if err := errors.Join(err, port.Close()); err != nil {
		t.Fatal(err)
	}
}

// systemReset resets a VM by one of its monitors, and waits for QEMU's event that it was reset.
func systemReset(t *testing.T, h *lab.Host, monitor string) {
	t.Helper()
	ctx := testContext(t)
	client, err := qmp.Dial(ctx, h.Path(monitor))
	if err != nil {
		t.Fatal(err)
	}
	events := client.Subscribe("RESET")
	if err := client.Do(ctx, "system_reset", nil, nil); err != nil {
		t.Fatal(err)
	}
	select {
	case _, open := <-events.Events():
		if !open {
			t.Fatalf("QEMU ended of a reset: %v", client.Err())
		}
	case <-ctx.Done():
		t.Fatalf("QEMU does not report the reset: %v", ctx.Err())
	}
	if err := client.Disconnect(); err != nil {
		t.Fatal(err)
	}
}

// moveLinux migrates the guest and checks it on its new host.
func moveLinux(t *testing.T, guest *report.Log, port *report.Port, from, to *lab.Host) {
	t.Helper()
	awaitWindows(t, guest, 3)
	if err := port.Close(); err != nil {
		t.Fatal(err)
	}
	before := guest.Last()
	m := migrate(t, from, to, "there-"+to.Name)
	checkFigures(t, m)

	port = openGuest(t, to, guest)
	awaitWindows(t, guest, 3)
	verifyLinux(t, guest, port)
	if after := guest.Last(); after.UptimeMS <= before.UptimeMS {
		t.Errorf("the guest's clock stood still: %d ms before and %d ms after", before.UptimeMS, after.UptimeMS)
	}
	if err := port.Close(); err != nil {
		t.Error(err)
	}
	t.Logf("to host %s: downtime %v, %d faults, p50 %v, p99 %v, residency %v, %d of %d pages zero",
		to.Name, m.GetProgress().GetDowntime().AsDuration(), m.GetProgress().GetFaults(),
		m.GetProgress().GetFaultP50().AsDuration(), m.GetProgress().GetFaultP99().AsDuration(),
		m.GetProgress().GetResidency().AsDuration(), m.GetProgress().GetPagesZero(), m.GetProgress().GetPagesTotal())
}

// awaitWindows waits for n more reports of the guest.
func awaitWindows(t *testing.T, guest *report.Log, n int) {
	t.Helper()
	seen := 0
	if _, _, err := guest.Wait(testContext(t), guest.Len(), func(l report.Line) bool {
		if l.Window != nil {
			seen++
		}
		return seen == n
	}); err != nil {
		t.Fatal(err)
	}
}

// checkFigures checks that a completed migration has all pages, and that none of its figures is missing. All pages may
// have arrived before the guest needed one, or before one for which it waited was timed.
func checkFigures(t *testing.T, m *migratedv1.Migration) {
	t.Helper()
	p := m.GetProgress()
	if p.GetPagesPresent() != p.GetPagesTotal() || p.GetPagesTotal() == 0 {
		t.Errorf("%d of %d pages are present", p.GetPagesPresent(), p.GetPagesTotal())
	}
	if p.GetBytesOnWire() == 0 || p.GetBytesDeviceState() == 0 ||
		p.GetDowntime().AsDuration() <= 0 || p.GetResidency().AsDuration() <= 0 ||
		p.GetFaults() == 0 && p.GetFaultP50().AsDuration() > 0 {
		t.Errorf("figures are missing: %v", p)
	}
}

// TestMetalGuest migrates the bare-metal guest under KVM, there and back, stops
// it and reads all of its memory: every page holds pass n or n+1, in order.
func TestMetalGuest(t *testing.T) {
	needKVM(t)
	for _, c := range []struct {
		name string
		vm   lab.VMConfig
	}{
		{"4KiB 1 block", lab.VMConfig{Nodes: 1}},
		{"4KiB 2 blocks unprivileged", lab.VMConfig{Nodes: 2, Unprivileged: true}},
		{"2MiB 1 block", lab.VMConfig{Nodes: 1, HugePages: true}},
		{"private", lab.VMConfig{Backend: lab.BackendDefault}},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.vm.KVM, c.vm.VCPUs, c.vm.MemoryMiB = true, 1, 64
			if c.vm.HugePages {
				uffdtest.ReserveHugePages(t, 64)
			}
			vm := metal(t, c.vm.WithDevices(1, 1))
			l := newLab(t)
			startVM(t, l.A, vm)
			moveMetal(t, vm, l.A, l.B)
			moveMetal(t, vm, l.B, l.A)
		})
	}
}

func moveMetal(t *testing.T, vm lab.VMConfig, from, to *lab.Host) {
	t.Helper()
	before := metalPass(t, from, func(pass uint64) bool { return pass >= 2 })
	m := migrate(t, from, to, "there-"+to.Name)
	checkFigures(t, m)
	metalPass(t, to, func(pass uint64) bool { return pass > before })

	if pass := checkMetal(t, vm, to); pass <= before {
		t.Errorf("memory is of pass %d, the guest had written %d to its serial port before", pass, before)
	}
	t.Logf("to host %s: downtime %v, %d faults, p50 %v", to.Name,
		m.GetProgress().GetDowntime().AsDuration(), m.GetProgress().GetFaults(), m.GetProgress().GetFaultP50().AsDuration())
}
