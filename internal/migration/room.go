// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"errors"
	"fmt"
	"os"

	"github.com/migrated-vm/migrated/internal/cgroup"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// errNotInGroup says that a limit of a control group would end the VM: the kernel kills who goes beyond it, or sends SIGBUS
// where huge pages are limited.
var errNotInGroup = errors.New("the VM does not fit into the control group of its QEMU")

// qemuNeeds is what a QEMU takes at least besides the VM's memory.
const qemuNeeds = 64 << 20

// checkRoom refuses a VM for whose memory the groups have no room. besides is what else its QEMU will take.
func checkRoom(machine *migratedv1.SourceMachine, groups cgroup.Groups, besides uint64) error {
	needs := map[string]uint64{cgroup.Memory: besides}
	for _, b := range machine.GetRamBlocks() {
		if b.GetPageSize() <= uint64(os.Getpagesize()) {
			needs[cgroup.Memory] += b.GetSize() + b.GetSize()/256 // and the tables of its pages
		} else {
			needs[cgroup.HugePages(b.GetPageSize())] += b.GetSize()
		}
	}
	for resource, bytes := range needs {
		least, limited, err := groups.Least(resource)
		if err != nil {
			return err
		}
		if limited && least.Left() < bytes {
			return withRemedy(
				fmt.Errorf("%w: it needs %d MiB, and %s has %d MiB left (%s is %d MiB)",
					errNotInGroup, bytes>>20, least.Group, least.Left()>>20, least.File, least.Max>>20),
				"raise that limit (of a unit of systemd's: systemctl set-property UNIT MemoryMax=), or have QEMUs started in another "+
					"control group: qemu_cgroup in the destination's configuration")
		}
	}
	return nil
}

// checkFutureRoom does so before QEMU is started, which may take the VM's memory at once.
func (d *Destination) checkFutureRoom() error {
	groups, err := cgroup.Of(os.Getpid())
	if d.cfg.Cgroup != "" {
		groups, err = cgroup.At(d.cfg.Cgroup)
	}
	if err != nil {
		return err
	}
	return checkRoom(d.cfg.Request.GetMachine(), groups, qemuNeeds)
}

// checkRoomNow asks for the groups that QEMU is in by now, and for the host. Its memory has been dropped.
func (d *Destination) checkRoomNow() error {
	groups, err := cgroup.Of(d.vm.Pid)
	if err != nil {
		return err
	}
	machine := d.cfg.Request.GetMachine()
	if err := checkRoom(machine, groups, 0); err != nil {
		return err
	}
	return thisHost.checkHolds(machine, d.blocks)
}
