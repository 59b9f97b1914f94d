// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qmp"
)

// prepareContLock makes the lock that keeps the source's QEMU from continuing the VM, which is not locked yet. A QEMU
// that cannot have it moves its VM without: the locks of its images remain, and that a VM which goes on is noticed.
func (s *Source) prepareContLock(ctx context.Context) {
	s.closeContLock() // of the move before, where this one starts over
	var err error
	if s.contLock, err = s.vm.NewContLock(ctx); err != nil {
		s.log.Warn("only the locks of its images will keep QEMU from continuing a VM that was handed over", "error", err)
	}
}

// lockCont makes QEMU refuse, from the commit on, to continue the VM for anybody but removeContLock's callers.
func (s *Source) lockCont() {
	if s.contLock == nil {
		return
	}
	if err := s.contLock.Lock(); err != nil {
		s.log.Warn("nothing but the locks of its images keeps QEMU from continuing the VM", "error", err)
	}
}

// closeContLock leaves the lock to QEMU.
func (s *Source) closeContLock() {
	if s.contLock != nil {
		s.contLock.Close() // a file in memory
	}
}

// removeContLock lets QEMU continue the VM, which has not run anywhere else, or whose operator says that it does not.
// QEMU is asked nothing where no lock was made: the VM stands still meanwhile.
func (s *Source) removeContLock(ctx context.Context, vm *qemu.VM) {
	if s.contLock == nil && !s.takenUp {
		return
	}
	var gone *qmp.DisconnectedError
	if err := vm.RemoveContLock(ctx); err != nil && !errors.As(err, &gone) {
		s.log.Warn("the lock that keeps QEMU from continuing the VM stays", "node", qemu.ContLockNode, "error", err)
	}
}
