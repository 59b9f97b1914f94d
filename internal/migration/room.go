// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"errors"
	"fmt"
	"os"

	"github.com/migrated-vm/migrated/internal/cgroup"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// errNotInGroup says that the VM does not fit within a limit of a control group. The kernel kills a process that
// exceeds the limit, or sends SIGBUS where huge pages are limited.
var errNotInGroup = errors.New("the VM does not fit into the control group of its QEMU")

// qemuNeeds is the least that a QEMU takes besides the VM's memory, in bytes.
const qemuNeeds = 64 << 20

// checkCgroupRoom refuses a VM whose memory does not fit into the control groups. besides is what QEMU will take in
// addition, in bytes.
func checkCgroupRoom(machine *migratedv1.SourceMachine, groups cgroup.Groups, besides uint64) error {
	needs := map[string]uint64{cgroup.Memory: besides}
	for _, b := range machine.GetRamBlocks() {
		if b.GetPageSize() <= uint64(os.Getpagesize()) {
			needs[cgroup.Memory] += b.GetSize() + b.GetSize()/256 // plus page tables
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
			example := ""
			if resource == cgroup.Memory {
				example = " (of a unit of systemd's: systemctl set-property UNIT MemoryMax=)"
			}
			return withRemedy(
				fmt.Errorf("%w: it needs %d MiB, and %s has %d MiB left (%s is %d MiB)",
					errNotInGroup, bytes>>20, least.Group, least.Left()>>20, least.File, least.Max>>20),
				"raise that limit"+example+
					", or have QEMUs started in another control group: qemu_cgroup in the destination's configuration")
		}
	}
	return nil
}

// groupsOf returns the control group and all above it. An empty group means the control group of this process.
func groupsOf(group string) (cgroup.Groups, error) {
	if group == "" {
		return cgroup.Of(os.Getpid())
	}
	return cgroup.At(group)
}

// checkRoomBeforeStart calls checkCgroupRoom for the control group that QEMU will be started in. It runs before QEMU is
// started, because QEMU may take all of the VM's memory at once.
func (d *Destination) checkRoomBeforeStart() error {
	groups, err := groupsOf(d.cfg.Cgroup)
	if err != nil {
		return err
	}
	return checkCgroupRoom(d.cfg.Request.GetMachine(), groups, qemuNeeds)
}

// checkRoomAfterStart checks the control groups that QEMU is in now, and what the host has to give. The VM's memory was
// dropped before.
func (d *Destination) checkRoomAfterStart() error {
	groups, err := cgroup.Of(d.vm.Pid)
	if err != nil {
		return err
	}
	machine := d.cfg.Request.GetMachine()
	if err := checkCgroupRoom(machine, groups, 0); err != nil {
		return err
	}
	return thisHost.checkFits(machine, d.blocks)
}
