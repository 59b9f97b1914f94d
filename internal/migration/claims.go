// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"fmt"
	"sync"

	"github.com/migrated-vm/migrated/internal/qemu"
)

// claimed are the QEMUs that the migrations of this process have to do with, at either end.
var claimed = claims{by: map[qemu.Identity]string{}}

// claims says which migration has a QEMU. A VM is known by its process: it has as many sockets as it has monitors, and
// two migrations of it, or one of a VM that has not all of its memory yet, would each take it for its own.
type claims struct {
	mu sync.Mutex
	by map[qemu.Identity]string // ids
}

// takeVM has the QEMU that vm is connected to be that migration's, and returns what to give back.
func (c *claims) takeVM(vm *qemu.VM, id string) (qemu.Identity, error) {
	identity, err := vm.Identity()
	if err == nil {
		err = c.take(identity, id)
	}
	if err != nil {
		return qemu.Identity{}, err
	}
	return identity, nil
}

// take has the QEMU be that migration's, unless it is another's. give it back.
func (c *claims) take(vm qemu.Identity, id string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for known := range c.by {
		if !known.Alive() {
			delete(c.by, known)
		}
	}
	if err := c.check(vm, id); err != nil {
		return err
	}
	c.by[vm] = id
	return nil
}

// refuse fails where the QEMU that vm is connected to is a migration's.
func (c *claims) refuse(vm *qemu.VM) error {
	identity, err := vm.Identity()
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.check(identity, "")
}

// check fails where the QEMU is another migration's. The caller holds mu.
func (c *claims) check(vm qemu.Identity, id string) error {
	other, exists := c.by[vm]
	if !exists || other == id { // its own was an earlier run's
		return nil
	}
	return withRemedy(fmt.Errorf("this VM, process %d, is being migrated already, by migration %s", vm.PID, other),
		fmt.Sprintf("follow that one with 'migrated watch %s', and migrate the VM when it is over", other))
}

func (c *claims) give(vm qemu.Identity) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.by, vm)
}
