// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/check"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// verifyState refuses a VM that has stopped by itself since it was checked: a disk error stopped it, its guest panicked
// or sleeps. Without this check it would be taken for a VM that somebody paused.
func (s *Source) verifyState(ctx context.Context) error {
	results, err := check.State(ctx, s.vm)
	if err != nil {
		return fmt.Errorf("ask QEMU what the VM does: %w", err)
	}
	if err := refusalOf("the VM changed by itself", results); err != nil {
		return withReason(err, migratedv1.Reason_REASON_VM_STOPPED_ITSELF)
	}
	return nil
}

// verifyStopped is called after the VM was stopped. It returns an error if the VM's state had changed just before: ran
// says whether it ran until then, which must be as in wasRunning, and its guest must not have gone to sleep.
func (s *Source) verifyStopped(ctx context.Context, ran bool) error {
	slept := false
	for len(s.sleepEvents.Events()) > 0 {
		e, open := <-s.sleepEvents.Events()
		slept = open && e.Name == "SUSPEND"
	}
	if ran == s.wasRunning && !slept {
		return nil
	}
	was := s.wasRunning
	s.wasRunning = ran // the state that continueVM restores
	switch err := s.verifyState(ctx); {
	case err != nil:
		return err
	case slept: // QEMU 9.0 and newer pause it
		return withRemedy(withReason(errors.New("its guest went to sleep at this moment"),
			migratedv1.Reason_REASON_VM_STOPPED_ITSELF),
			"wake the guest up (QMP system_wakeup), then migrate it again")
	}
	return withRemedy(withReason(
		fmt.Errorf("somebody else paused or continued it at this moment (running: %t, then %t)", was, ran),
		migratedv1.Reason_REASON_INTERFERED), "migrate it again")
}

// checkDisksGivenUp fails if the source's QEMU still has a disk that the destination's is to take: both would write to
// it. It is called after the save.
func (s *Source) checkDisksGivenUp(ctx context.Context) error {
	if s.cfg.Spec.GetRehearse() {
		return nil
	}
	err := s.vm.CheckDisksGivenUp(ctx)
	if errors.Is(err, qemu.ErrDisksKept) {
		return withRemedy(err, "look into QEMU's log for why (a storage that is full or fails, a persistent bitmap that "+
			"cannot be stored, a filter that writes), remove the cause, then migrate it again")
	}
	if err != nil {
		return fmt.Errorf("ask QEMU whether it has given the VM's disks up: %w", err)
	}
	return nil
}
