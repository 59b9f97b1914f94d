// SPDX-License-Identifier: Apache-2.0

package lab_test

import (
	"context"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/image"
	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/pkg/testenv"
)

const (
	// pingEvery is how often a network card is pinged.
	pingEvery = 10 * time.Millisecond
	// lossOfHost is how many pings a busy host may lose by itself.
	lossOfHost = 3
)

// realVM is a VM with two disks and two network cards.
func realVM(t *testing.T) lab.VMConfig {
	t.Helper()
	needRoot(t)
	if _, err := exec.LookPath("qemu-img"); err != nil {
		testenv.CannotRun(t, "disks are made by qemu-img, of package qemu-utils: %v", err)
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		testenv.CannotRun(t, "network cards are taps: %v", err)
	}
	kernel, initrd, err := image.LinuxWithVirtio(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	return lab.RealVM(kernel, initrd, 256, 2, 2, "migrated.mem=64", "migrated.workers=1", "migrated.rate=500")
}

// realGuest is a Linux guest on a host, with the pingers of its network cards.
type realGuest struct {
	*testing.T
	vm    lab.VMConfig
	log   report.Log
	port  *report.Port
	pings []*lab.Pinger
}

// boot starts the VM, waits until its guest works and then starts to ping it.
func boot(t *testing.T, l *lab.Lab, vm lab.VMConfig) *realGuest {
	t.Helper()
	showOutput(t, l.A)
	g := &realGuest{T: t, vm: vm}
	port, err := l.A.Boot(testContext(t), vm, &g.log)
	if err != nil {
		t.Fatal(err)
	}
	g.port = port
	ready, err := g.log.WaitReady(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	if ready.Disks != vm.Disks || ready.Cards != vm.NICs {
		t.Errorf("the guest has %d disks and %d network cards", ready.Disks, ready.Cards)
	}
	for i := range vm.NICs {
		p, err := l.Ping(vm, i, pingEvery)
		if err != nil {
			t.Fatal(err)
		}
		g.pings = append(g.pings, p)
	}
	return g
}

// open opens the guest's reports on a host.
func (g *realGuest) open(h *lab.Host) {
	g.Helper()
	port, err := h.Guest(testContext(g.T), &g.log)
	if err != nil {
		g.Fatal(err)
	}
	g.port = port
}

func (g *realGuest) hangUp() {
	g.Helper()
	if err := g.port.Close(); err != nil {
		g.Error(err)
	}
}

// work waits until the guest has done that many more requests with each disk and each network card.
func (g *realGuest) work(ctx context.Context, requests uint64) {
	g.Helper()
	disks, cards := g.log.Disks(), g.log.Cards()
	if _, _, err := g.log.Wait(ctx, g.log.Len(), func(line report.Line) bool {
		if line.Window == nil {
			return false
		}
		for i, d := range line.Window.Disks {
			if i < len(disks) && d.Writes+d.Reads < disks[i].Writes+disks[i].Reads+requests {
				return false
			}
		}
		for i, c := range line.Window.Cards {
			if i < len(cards) && c.Answered < cards[i].Answered+requests {
				return false
			}
		}
		return len(line.Window.Disks) == g.vm.Disks && len(line.Window.Cards) == g.vm.NICs
	}); err != nil {
		g.Fatalf("the guest does not work: %v; %+v, %+v", err, g.log.Disks(), g.log.Cards())
	}
}

// verify has the guest check everything.
func (g *realGuest) verify() *report.Verified {
	g.Helper()
	v, err := g.port.Verify(testContext(g.T))
	if err != nil {
		g.Fatalf("%v; garbled: %.200q", err, g.log.Garbled())
	}
	if v.Pages == 0 || v.Found != 0 || v.Blocks == 0 || v.BlocksFound != 0 {
		g.Errorf("the guest found damage: %+v", v)
	}
	if err := g.log.Err(); err != nil {
		g.Error(err)
	}
	for _, c := range v.Cards {
		if c.Answered == 0 || c.Wrong+c.Errors != 0 {
			g.Errorf("network card: %+v", c)
		}
	}
	g.Logf("%d blocks checked; %+v; %+v", v.Blocks, v.Disks, v.Cards)
	return v
}

// awaitPings waits until each network card has answered this many pings.
func (g *realGuest) awaitPings(ctx context.Context, answers int) {
	g.Helper()
	for i, p := range g.pings {
		if err := p.AwaitAnswers(ctx, answers); err != nil {
			g.Fatalf("card %d: %v", i, err)
		}
	}
}

// stopPings ends the pings and returns their results.
func (g *realGuest) stopPings() []lab.Pings {
	g.Helper()
	var all []lab.Pings
	for i, p := range g.pings {
		pings, err := p.Stop()
		if err != nil {
			g.Error(err)
		}
		g.Logf("card %d: %d pings, %d lost, longest gap %v, %d announcements",
			i, pings.Sent, pings.Lost, pings.LongestGap, len(pings.Announcements))
		all = append(all, pings)
	}
	g.pings = nil
	return all
}

// TestRealVM boots a VM with all typical devices and does not move it: everything works, and hardly
// a ping is lost.
func TestRealVM(t *testing.T) {
	for name, change := range map[string]func(*lab.VMConfig){
		"root ports":   func(*lab.VMConfig) {},
		"one bus":      func(c *lab.VMConfig) { c.RootPorts = false },
		"unprivileged": func(c *lab.VMConfig) { c.Unprivileged, c.Number, c.FreePageReporting = true, 7, true },
		"UEFI": func(c *lab.VMConfig) {
			if _, err := os.Stat("/usr/share/OVMF/OVMF_CODE_4M.fd"); err != nil {
				testenv.CannotRun(t, "%v", lab.ErrNoFirmware)
			}
			c.UEFI = true
		},
	} {
		t.Run(name, func(t *testing.T) {
			vm := realVM(t)
			change(&vm)
			g := boot(t, stage(t), vm)
			g.work(testContext(t), 300)
			g.awaitPings(testContext(t), 100)
			g.verify()
			for i, pings := range g.stopPings() {
				if pings.Lost > lossOfHost {
					t.Errorf("card %d: of %d pings, %d are lost", i, pings.Sent, pings.Lost)
				}
			}
			g.hangUp()
		})
	}
}
