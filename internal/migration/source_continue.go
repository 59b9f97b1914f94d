// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qmp"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// Pauses between two attempts to continue the VM.
const (
	contPause        = 200 * time.Millisecond
	longestContPause = 2 * time.Second
)

// continueTimeout bounds one attempt to continue the VM. It is a variable for tests.
var continueTimeout = 30 * time.Second

// continueVM restores the VM to what it would be if it had not been stopped. A QEMU that hangs, or refuses, is asked
// again until it ends, or until this daemon does: a command to stop the VM that QEMU has not answered may still be
// pending, and what QEMU refuses for may pass, such as a lock that another program has on an image. The caller appends
// note, which is for the operator, to where the VM is. The error says why the VM is not what it was. Where QEMU was not
// brought to it, the record stays, so that a restarted daemon tries again.
func (s *Source) continueVM() (note string, err error) {
	if s.endGuard != nil {
		s.endGuard()
	}
	testPoint("source-backing-out")
	began := time.Now()
	for pause := contPause; ; pause = min(2*pause, longestContPause) {
		s.awaitMonitor()
		if note, err = s.tryContinue(); err == nil {
			s.update(func(m *migratedv1.Migration) { m.Error = nil }) // of an earlier attempt
			return note, nil
		}
		if s.qemuEnded() || !s.mayPass(err) || s.daemonCtx.Err() != nil && time.Since(began) > continueTimeout {
			s.log.Error("cannot continue the VM", "error", err)
			return note, err
		}
		s.log.Warn("QEMU does not continue the VM yet", "error", err)
		s.showNotContinued(err)
		time.Sleep(pause)
	}
}

// mayPass reports whether another attempt to continue the VM may succeed, where err is why the last one did not.
func (s *Source) mayPass(err error) bool {
	var gone *qmp.DisconnectedError
	switch {
	case errors.Is(err, context.DeadlineExceeded): // QEMU hangs
		return true
	case errors.As(err, &gone): // without the daemon nobody connects again
		return s.daemonCtx.Err() == nil
	case !s.wasRunning: // the destination may have the disks of a paused VM until it is told to give up
		return false
	default:
		return errors.Is(err, qmp.ErrGeneric)
	}
}

// showNotContinued shows that the VM is not continued yet, because of err.
func (s *Source) showNotContinued(err error) {
	location, _, words := locateVM(s.monitor())
	s.fail(migratedv1.MigrationState_MIGRATION_STATE_DEVICE, withRemedy(err,
		"see why QEMU does not do it, such as a storage that does not answer or another program's lock on an image: "+
			"this daemon tries again until it does. Or "+s.contByHand()), whereabouts{location, words})
}

// contByHand tells an operator how to continue the VM.
func (s *Source) contByHand() string {
	return fmt.Sprintf("continue it with QMP 'cont' on %s, after blockdev-del of the node %s if it has that",
		s.cfg.Spec.GetVm(), qemu.ContLockNode)
}

// tryContinue is one attempt of continueVM.
func (s *Source) tryContinue() (note string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), continueTimeout)
	defer cancel()
	vm := s.monitor()
	if s.takenUp && s.protocol < savesDevices {
		if err := vm.CancelMigrate(ctx); err != nil {
			s.log.Warn("cancel QEMU's own migration", "error", err)
		}
	}
	s.removeContLock(ctx, vm)
	if !s.wasRunning {
		return s.leavePaused(ctx)
	}
	if s.stoppedItself(ctx, vm) {
		note, err = s.leavePaused(ctx)
		return "; it stopped by itself, and is not continued" + note, cmp.Or(err, errStoppedItself)
	}
	if _, err := vm.Cont(ctx); err != nil {
		note = fmt.Sprintf("; it could not be continued (%v): %s", err, s.contByHand())
		return note, fmt.Errorf("continue the VM: %w", err)
	}
	testPoint("source-continued")
	s.removeRecord()
	return "", nil
}

// leavePaused takes back the disks of a VM that was paused before, and leaves it paused.
func (s *Source) leavePaused(ctx context.Context) (note string, err error) {
	if s.gaveUpDisks || s.takenUp {
		able, err := s.monitor().ActivateDisks(ctx)
		switch {
		case err != nil:
			s.log.Error("cannot take the VM's disks back", "error", err)
			return fmt.Sprintf(", but QEMU could not take its disks back (%v); it tries again when it is continued", err),
				fmt.Errorf("take the VM's disks back: %w", err)
		case !able:
			s.removeRecord()
			return "; this QEMU takes its disks back when the VM is continued", nil
		}
	}
	s.removeRecord()
	return "", nil
}

// monitor returns the connection to QEMU: the second one if the first was lost.
func (s *Source) monitor() *qemu.VM {
	if s.reconnected != nil {
		return s.reconnected
	}
	return s.vm
}

// awaitMonitor connects to QEMU again if the monitor connection was lost while QEMU is alive. libvirt's connections are
// lost with its daemon, for example. The VM stands still until then. awaitMonitor stops when QEMU or this daemon ends;
// the next daemon takes up the record.
func (s *Source) awaitMonitor() {
	for s.monitor().QMP.Err() != nil && !s.qemuEnded() {
		vm, err := attachAgain(s.daemonCtx, s.cfg.Spec.GetVm(), s.vm)
		if err == nil {
			vm.PutBack(s.vm.Changed())
			s.closeReconnected()
			s.reconnected = vm
			return
		}
		s.log.Warn("the VM's QEMU does not answer yet", "error", err)
		s.fail(migratedv1.MigrationState_MIGRATION_STATE_DEVICE,
			withRemedy(fmt.Errorf("the connection to the VM's QEMU was lost, and cannot be made again: %w", err),
				"see that "+s.cfg.Spec.GetVm()+" can be connected to (start libvirt's daemon, if it is libvirt's): "+
					"the VM goes on then"),
			whereabouts{migratedv1.Location_LOCATION_UNKNOWN, "the VM was about to stop on the source"})
		if sleep(s.daemonCtx, time.Second) != nil {
			return
		}
	}
}

// closeReconnected closes the second connection to QEMU, if there is one.
func (s *Source) closeReconnected() {
	if s.reconnected == nil {
		return
	}
	if err := s.reconnected.Close(); err != nil {
		s.log.Warn("cannot disconnect from QEMU", "error", err)
	}
	s.reconnected = nil
}
