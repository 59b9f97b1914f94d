// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"fmt"
	"sync"

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/process"
)

// qemuClaims has the QEMU processes that migrations of this process use, on either end.
var qemuClaims = claims{owners: map[process.Identity]string{}}

// claims records which migration uses which QEMU. A VM is identified by its process, because it has as many sockets as
// it has monitors. Without claims, two migrations could take the same VM, and a migration could take a VM that is still
// arriving here.
type claims struct {
	mu     sync.Mutex
	owners map[process.Identity]string // QEMU → id of its migration
}

// claimVM claims the QEMU that vm is connected to for migration id. It returns the identity to pass to unclaim.
func (c *claims) claimVM(vm *qemu.VM, id string) (process.Identity, error) {
	identity, err := vm.Identity()
	if err == nil {
		err = c.claim(identity, id)
	}
	if err != nil {
		return process.Identity{}, err
	}
	return identity, nil
}

// claim claims a QEMU for migration id, and fails if another migration has it. unclaim ends the claim.
func (c *claims) claim(vm process.Identity, id string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for known := range c.owners {
		if !known.Alive() {
			delete(c.owners, known)
		}
	}
	if err := c.checkFree(vm, id); err != nil {
		return err
	}
	c.owners[vm] = id
	return nil
}

// checkUnclaimed fails if a migration has claimed the QEMU that vm is connected to.
func (c *claims) checkUnclaimed(vm *qemu.VM) error {
	identity, err := vm.Identity()
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.checkFree(identity, "")
}

// checkFree fails if another migration has claimed the QEMU. The caller holds mu.
func (c *claims) checkFree(vm process.Identity, id string) error {
	other, exists := c.owners[vm]
	if !exists || other == id { // its own claim: from an earlier attempt of this migration
		return nil
	}
	return withRemedy(fmt.Errorf("this VM, process %d, is being migrated already, by migration %s", vm.PID, other),
		fmt.Sprintf("follow that one with 'migrated watch %s', and migrate the VM when it is over", other))
}

// ClaimOf returns the id of the migration of this process that has claimed the QEMU with process number pid; empty:
// none.
func ClaimOf(pid int) string {
	qemuClaims.mu.Lock()
	defer qemuClaims.mu.Unlock()
	for vm, id := range qemuClaims.owners {
		if vm.PID == pid && vm.Alive() {
			return id
		}
	}
	return ""
}

// unclaim ends the claim on a QEMU.
func (c *claims) unclaim(vm process.Identity) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.owners, vm)
}
