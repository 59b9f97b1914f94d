// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qmp"
)

// prepareContLock makes, without locking it yet, the lock that keeps the source's QEMU from continuing the VM. If QEMU
// does not support it, the migration goes on without: the VM is still protected by the locks of its disk images, and a
// VM that somebody continues is still noticed.
func (s *Source) prepareContLock(ctx context.Context) {
	s.closeContLock() // that of an earlier attempt, if this one starts over
	var err error
	if s.contLock, err = s.vm.NewContLock(ctx); err != nil {
		s.log.Warn("only the locks of its images will keep QEMU from continuing a VM that was handed over", "error", err)
	}
}

// lockCont makes QEMU refuse to continue the VM, from the commit on, until removeContLock is called.
func (s *Source) lockCont() {
	if s.contLock == nil {
		return
	}
	if err := s.contLock.Lock(); err != nil {
		s.log.Warn("only the locks of its images keep QEMU from continuing the VM", "error", err)
	}
}

// closeContLock closes the daemon's side of the lock. QEMU keeps it.
func (s *Source) closeContLock() {
	if s.contLock != nil {
		s.contLock.Close() // a file in memory
	}
}

// removeContLock lets QEMU continue the VM again. The VM has not run anywhere else, or its operator says that it does
// not. If no lock was made, removeContLock does not ask QEMU, because the VM stands still meanwhile.
func (s *Source) removeContLock(ctx context.Context, vm *qemu.VM) {
	if s.contLock == nil && !s.takenUp {
		return
	}
	var gone *qmp.DisconnectedError
	if err := vm.RemoveContLock(ctx); err != nil && !errors.As(err, &gone) {
		s.log.Warn("the lock that keeps QEMU from continuing the VM stays", "node", qemu.ContLockNode, "error", err)
	}
}
