// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"

	"github.com/migrated-vm/migrated/internal/qemu"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// verifyState refuses a VM that was fit to be moved when it was looked at, and has changed by itself since: an error of
// a disk stopped it, its guest panicked, or sleeps. It would be taken for one that somebody paused.
func (s *Source) verifyState(ctx context.Context) error {
	results, err := qemu.CheckState(ctx, s.vm)
	if err != nil {
		return fmt.Errorf("ask QEMU what the VM does: %w", err)
	}
	if err := refuse("the VM changed by itself", results); err != nil {
		return withReason(err, migratedv1.Reason_REASON_VM_STOPPED_ITSELF)
	}
	return nil
}

// verifyStopped says why a VM did not stand still as it was to when it was stopped: it ran until then, or did not.
func (s *Source) verifyStopped(ctx context.Context, ran bool) error {
	slept := false
	for len(s.sleeps.Events()) > 0 {
		e, open := <-s.sleeps.Events()
		slept = open && e.Name == "SUSPEND"
	}
	if ran == s.wasRunning && !slept {
		return nil
	}
	was := s.wasRunning
	s.wasRunning = ran // what it has to be put back to
	switch err := s.verifyState(ctx); {
	case err != nil:
		return err
	case slept: // QEMU 9.0 and newer pause it
		return withRemedy(withReason(errors.New("its guest went to sleep at this moment"), migratedv1.Reason_REASON_VM_STOPPED_ITSELF),
			"wake the guest up (QMP system_wakeup), then migrate it again")
	}
	return withRemedy(withReason(
		fmt.Errorf("somebody else paused or continued it at this moment (running: %t, then %t)", was, ran),
		migratedv1.Reason_REASON_INTERFERED), "migrate it again")
}
