// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// Status and remedies for a VM whose QEMU on this host has ended.
const (
	endedStatus = "the VM's QEMU on the source has ended; what it held of the VM is lost"
	// remedyEndVM is the remedy if the VM runs at the destination. It is not known here which memory it will need.
	remedyEndVM = "look at the destination: where 'migrated status %s' says that memory is lost, end the VM there and " +
		"start it anew from its disks"
	// remedyStart is the remedy if the destination was never told to run the VM.
	remedyStart = "start the VM anew from its disks: the destination was never told to run it"
	// remedyStartAnew is the remedy if the VM does not run at the destination either.
	remedyStartAnew = "start the VM anew from its disks, once you are certain that it does not run on the destination"
)

// errOurQEMUGone says that this host's QEMU has ended. No command of an operator brings it back.
var errOurQEMUGone = errors.New("the source's QEMU has ended before all of the VM's memory had left")

// watchQEMU shows an error when QEMU ends while the VM, which was handed over, still needs its memory. Pages that are
// in files are still served then. stop ends the watch, and returns when it has ended.
func (s *Source) watchQEMU(ctx context.Context) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.vm.WaitExit(ctx); err != nil {
			return // stopped; QEMU is alive
		}
		s.log.Error("QEMU has ended before all of the VM's memory had left", "process", s.vm.Pid)
		s.qemuGone.Store(true)
		s.updateUnlessOver(func(m *migratedv1.Migration) { m.Error = s.orphanError() })
	}()
	return func() {
		cancel()
		<-done
	}
}

// orphanError returns the error that is shown while the destination reports none of its own.
func (s *Source) orphanError() *migratedv1.MigrationError {
	shown := Describe(withRemedy(errOurQEMUGone, fmt.Sprintf(remedyEndVM, s.cfg.ID)))
	where := "the destination was told to run the VM, and has not answered yet"
	if s.confirmedRun() {
		where = "the VM is on the destination"
	}
	shown.VmStatus = where + "; " + lostStatus
	return shown
}

// qemuEnded reports whether this host's QEMU has ended.
func (s *Source) qemuEnded() bool {
	if s.vm == nil {
		return false
	}
	return s.qemuGone.Load() || s.vm.Ended()
}

// unlessEnded returns the remedy for a VM that was handed over and may run nowhere: remedy, or remedyStartAnew if
// this host's QEMU has ended, too.
func (s *Source) unlessEnded(remedy string) string {
	if s.qemuEnded() {
		return remedyStartAnew
	}
	return remedy
}
