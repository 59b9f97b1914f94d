// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// What becomes of a VM whose QEMU on this host has ended.
const (
	endedStatus = "the VM's QEMU on the source has ended, and with it all that was the VM's there"
	// endVM is what to do where the VM runs at the destination. Nobody knows here what it will need.
	endVM = "look at the destination: where 'migrated status %s' says that memory is lost, end the VM there and " +
		"start it anew from its disks"
	// startAnew is what to do where it does not.
	startAnew = "start the VM anew from its disks, once you are certain that it does not run on the destination"
)

// errOurQEMUGone says that this host's QEMU has ended, and no operator's command brings it back.
var errOurQEMUGone = errors.New("the source's QEMU has ended before all of the VM's memory had left")

// watchQEMU says so when QEMU ends while the VM, which was handed over, needs its memory. What is in files is
// served yet. It watches until stop is called, which returns when it has ended.
func (s *Source) watchQEMU(ctx context.Context) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.vm.WaitExit(ctx); err != nil {
			return // it is alive
		}
		s.log.Error("QEMU has ended before all of the VM's memory had left", "process", s.vm.Pid)
		s.gone.Store(true)
		s.update(func(m *migratedv1.Migration) {
			if !Terminal(m.GetState()) {
				m.Error = s.orphanError()
			}
		})
	}()
	return func() {
		cancel()
		<-done
	}
}

// orphanError is what is shown while the destination says nothing of its own.
func (s *Source) orphanError() *migratedv1.MigrationError {
	shown := describe(withRemedy(errOurQEMUGone, fmt.Sprintf(endVM, s.cfg.ID)))
	where := "the destination was told to run the VM, and has not answered yet"
	if s.runsThere.Load() {
		where = "the VM is on the destination"
	}
	shown.VmStatus = where + "; " + lostStatus
	return shown
}

// ended says whether this host's QEMU has ended.
func (s *Source) ended() bool {
	if s.vm == nil {
		return false
	}
	return s.gone.Load() || s.vm.Ended()
}

// unless is the remedy for a VM that was handed over and may run nowhere, unless QEMU has ended here, too.
func (s *Source) unless(remedy string) string {
	if s.ended() {
		return startAnew
	}
	return remedy
}
