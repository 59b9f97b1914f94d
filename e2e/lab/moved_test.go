// SPDX-License-Identifier: Apache-2.0

package lab_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/guest/stamp"
	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/e2e/rival"
)

// TestQEMUMovesRealVM has QEMU's own migration move the VM there and back. It checks the lab's hosts: the VM's disks
// have what was written on both hosts, and its clients reach it on the host where it is.
func TestQEMUMovesRealVM(t *testing.T) {
	l := stage(t)
	vm := realVM(t)
	vm.VCPUs = 1 // with more, TCG may hang a guest that QEMU's own migration moves
	g := boot(t, l, vm)
	g.work(testContext(t), 100)
	for _, way := range [][2]*lab.Host{{l.A, l.B}, {l.B, l.A}} {
		g.hangUp()
		began := time.Now()
		moved, err := rival.Migrate(testContext(t), way[0], way[1], vm, rival.Options{})
		if err != nil {
			t.Fatal(err)
		}
		g.open(way[1])
		for i, p := range g.pings {
			if err := p.Await(testContext(t), time.Now()); err != nil {
				t.Errorf("card %d on host %s: %v", i, way[1].Name, err)
			}
			if _, ok := p.FirstAnnouncement(began); !ok {
				t.Errorf("card %d was not announced on host %s", i, way[1].Name)
			}
		}
		g.work(testContext(t), 100)
		v := g.verify()
		t.Logf("to host %s: %v, %d blocks checked", way[1].Name, moved.Downtime, v.Blocks)
	}
	for i, pings := range g.stopPings() {
		if pings.Answered == 0 {
			t.Errorf("card %d never answered", i)
		}
	}
	g.hangUp()
}

// TestDamageIsSeen damages a VM as no migration may, and checks that the lab detects it.
func TestDamageIsSeen(t *testing.T) {
	l := stage(t)
	vm := realVM(t)
	g := boot(t, l, vm)
	g.work(testContext(t), 100)
	t.Run("network", func(t *testing.T) {
		// The other end of a card is down for the time of 20 pings.
		if _, err := l.A.Run(testContext(t), "ip", "link", "set", "vm0nic1", "down"); err != nil {
			t.Fatal(err)
		}
		cut := time.Now()
		if err := g.pings[0].Await(testContext(t), cut.Add(20*pingEvery)); err != nil {
			t.Fatal(err)
		}
		if _, err := l.A.Run(testContext(t), "ip", "link", "set", "vm0nic1", "up"); err != nil {
			t.Fatal(err)
		}
		if err := g.pings[1].Await(testContext(t), time.Now()); err != nil {
			t.Fatal(err)
		}
		pings := g.stopPings()
		if pings[0].Lost > lossOfHost || pings[1].Lost <= lossOfHost || pings[1].LongestGap < 20*pingEvery {
			t.Errorf("card 0 lost %d pings, card 1 %d with a gap of %v", pings[0].Lost, pings[1].Lost, pings[1].LongestGap)
		}
	})
	t.Run("disk", func(t *testing.T) {
		// Stop the load, so that the guest does not write the block again first.
		if _, err := g.port.SetLoad(testContext(t), false); err != nil {
			t.Fatal(err)
		}
		block := changeBlock(t, l.Shared(vm.DiskFiles()[1]))
		v, err := g.port.Verify(testContext(t))
		if err != nil {
			t.Fatal(err)
		}
		if v.Found != 0 || v.BlocksFound != 1 || v.Disks[0].Corruptions != 0 || v.Disks[1].Corruptions != 1 {
			t.Errorf("block %d is wrong, and the guest says %+v", block, v)
		}
		line, _, err := g.log.Wait(testContext(t), 0, func(l report.Line) bool { return l.Corruption != nil })
		if err != nil {
			t.Fatal(err)
		}
		if c := line.Corruption; c.Disk != "disk1" || c.Page != block || c.Kind != stamp.Bitflip {
			t.Errorf("block %d is wrong, and the guest says %+v", block, c)
		}
		if err := g.log.Err(); !errors.Is(err, report.ErrDisk) {
			t.Errorf("Err = %v", err)
		}
	})
	g.hangUp()
}

// changeBlock changes a bit of a block that the guest wrote to the disk with that image, and returns the number of the
// block. Each of the guest's blocks lies within one cluster of the image.
func changeBlock(t *testing.T, image string) uint32 {
	t.Helper()
	content, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(image, os.O_WRONLY|os.O_SYNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for at := 0; at+stamp.PageSize <= len(content); at += stamp.PageSize {
		var p stamp.Page
		if err := binary.Read(bytes.NewReader(content[at:]), binary.LittleEndian, &p); err != nil {
			t.Fatal(err)
		}
		if index := uint32(p[0]); p[0] != 0 && p.Check(stamp.Random, index, uint32(p[1])) < 0 {
			const byteInBlock = 2000
			if _, err := f.WriteAt([]byte{content[at+byteInBlock] ^ 1}, int64(at+byteInBlock)); err != nil {
				t.Fatal(err)
			}
			return index & (1<<20 - 1)
		}
	}
	t.Fatalf("%s has no block of the guest's", image)
	return 0
}
