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
	var err error
	if s.contLock, err = s.vm.NewContLock(ctx); err != nil {
		s.log.Warn("nothing but the locks of its images will keep QEMU from continuing a VM that was handed over", "error", err)
	}
}

// lockCont makes QEMU refuse, from the commit on, to continue the VM for anybody but removeContLock's callers.
func (s *Source) lockCont() {
	if s.contLock == nil {
		return
	}
	if err := errors.Join(s.contLock.Lock(), s.contLock.Close()); err != nil {
		s.log.Warn("nothing but the locks of its images keeps QEMU from continuing the VM", "error", err)
	}
	s.contLock = nil
}

// closeContLock closes what is here of a lock that was not needed.
func (s *Source) closeContLock() {
	if s.contLock != nil {
		s.contLock.Close() // a file in memory
		s.contLock = nil
	}
}

// removeContLock lets QEMU continue the VM, which has not run anywhere else, or whose operator says that it does not.
func (s *Source) removeContLock(ctx context.Context, vm *qemu.VM) {
	s.closeContLock()
	var gone *qmp.DisconnectedError
	if err := vm.RemoveContLock(ctx); err != nil && !errors.As(err, &gone) {
		s.log.Warn("the lock that keeps QEMU from continuing the VM stays", "node", qemu.ContLockNode, "error", err)
	}
}
