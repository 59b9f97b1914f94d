// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"sync"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/image"
	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/e2e/rival"
)

// TestRealVM moves a VM that writes to its disks and whose network cards are pinged. No block is lost. Its clients
// reach it again, because each card is announced before it answers a ping.
func TestRealVM(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	kernel, initrd, err := image.LinuxWithVirtio(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	vm := lab.RealVM(kernel, initrd, 256, 2, 2, "migrated.mem=64", "migrated.workers=1", "migrated.rate=500")
	vm.Extra = append(vm.Extra, lab.EventsArgs()...)
	var guest report.Log
	port := bootLinux(t, l.A, vm, &guest)
	awaitBlocks(t, &guest, 200)
	if err := port.Close(); err != nil {
		t.Fatal(err)
	}
	var pingers []*lab.Pinger
	for i := range vm.NICs {
		p, err := l.Ping(vm, i, 10*time.Millisecond)
		if err != nil {
			t.Fatal(err)
		}
		pingers = append(pingers, p)
	}
	watch, err := l.WatchSwitch(testContext(t), l.A, l.B)
	if err != nil {
		t.Fatal(err)
	}
	var switched lab.Switch
	var watchErr error
	var watching sync.WaitGroup
	watching.Go(func() { switched, watchErr = watch.Wait(testContext(t)) })
	migrate(t, l.A, l.B, "real")
	if watching.Wait(); watchErr != nil {
		t.Fatal(watchErr)
	}
	port = openGuest(t, l.B, &guest)
	awaitBlocks(t, &guest, guest.Disks()[0].Writes+200)
	for i, p := range pingers {
		if err := p.Await(testContext(t), time.Now()); err != nil {
			t.Errorf("card %d: %v", i, err)
		}
		pings, err := p.Stop()
		if err != nil {
			t.Error(err)
		}
		announced, ok := pings.FirstAnnouncement(switched.Stopped)
		answered, answers := pings.FirstAnswer(switched.Resumed)
		if !ok || !answers || announced.At.After(answered) {
			t.Errorf("card %d was announced at %v, and answered at %v", i, announced.At, answered)
		}
		t.Logf("card %d: %d pings, %d lost, longest gap %v; "+
			"the VM stopped for %v, was announced after %v and answered after %v",
			i, pings.Sent, pings.Lost, pings.LongestGap, switched.Downtime(), announced.At.Sub(switched.Stopped),
			answered.Sub(switched.Stopped))
	}
	verified := verifyLinux(t, &guest, port)
	t.Logf("%d blocks checked; %+v; %+v", verified.Blocks, verified.Disks, verified.Cards)
	if err := port.Close(); err != nil {
		t.Error(err)
	}
}

// awaitBlocks waits until the guest has written that many blocks to each disk.
func awaitBlocks(t *testing.T, guest *report.Log, writes uint64) {
	t.Helper()
	if _, _, err := guest.Wait(testContext(t), guest.Len(), func(l report.Line) bool {
		if l.Window == nil || len(l.Window.Disks) == 0 {
			return false
		}
		for _, d := range l.Window.Disks {
			if d.Writes < writes {
				return false
			}
		}
		return true
	}); err != nil {
		t.Fatalf("the guest does not write to its disks: %v; %+v", err, guest.Disks())
	}
}

// TestPrivateRAMIsChecked moves a guest whose memory is in no file by QEMU's own migration, and checks that memory.
func TestPrivateRAMIsChecked(t *testing.T) {
	t.Parallel()
	l := newHosts(t)
	vm := metal(t, lab.VMConfig{VCPUs: 1, MemoryMiB: 64, Backend: lab.BackendDefault}.WithDevices(1, 1))
	startVM(t, l.A, vm)
	began := metalPass(t, l.A, func(pass uint64) bool { return pass >= 2 })
	checkMetal(t, vm, l.A)
	if _, err := rival.Migrate(testContext(t), l.A, l.B, vm, rival.Options{}); err != nil {
		t.Fatal(err)
	}
	metalPass(t, l.B, func(pass uint64) bool { return pass > began+1 })
	if pass := checkMetal(t, vm, l.B); pass < began {
		t.Errorf("memory is of pass %d, the guest had written %d before", pass, began)
	}
}
