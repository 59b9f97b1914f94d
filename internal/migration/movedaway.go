// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// MovedAway reports whether process pid is only what is left of a VM that was moved away: its record says that all of
// the VM has left, and QEMU says now that the VM does not run. problem is why another VM with a committed record cannot
// be moved; nil: it has no such record, or runs here. Nothing is assumed, because a host that seems to be empty is shut
// down.
//
// No migration of this process may use the QEMU, because its monitor may have room for one client.
func (r *Records) MovedAway(ctx context.Context, pid int) (away bool, problem, err error) {
	rec, found, err := r.ForVM(pid)
	if err != nil || !found {
		return false, nil, err
	}
	switch running, err := rec.runs(ctx); {
	case err != nil:
		return false, withRemedy(
			fmt.Errorf("migration %s handed this VM over, and QEMU cannot say whether it runs here: %w", rec.ID, err),
			"see 'migrated status "+rec.ID+"', and that "+rec.VM+" can be connected to, then look again"), nil
	case running: // its operator has continued it: it is the VM again, see refuseHandedOver
		return false, nil, nil
	case !rec.Completed:
		return false, rec.notHere(), nil
	}
	return true, nil, nil
}

// runs asks the QEMU of the record whether its VM runs.
func (rec *Record) runs(ctx context.Context) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, attachTimeout)
	defer cancel()
	vm, err := attachSame(ctx, rec.VM, rec.Identity)
	if err != nil {
		return false, err
	}
	running, err := vm.Running(ctx)
	return running, errors.Join(err, vm.Close())
}

// notHere says why a QEMU with a committed record, whose VM stands still, is not taken for the VM.
func (rec *Record) notHere() error {
	handedOver := fmt.Sprintf("this VM was handed over to %s by migration %s at %s",
		rec.Destination, rec.ID, rec.HandedOver.Format(time.RFC3339))
	if rec.Completed {
		return withRemedy(errors.New(handedOver+" and is only kept for its memory"),
			"migrate the VM from the host on which it runs now")
	}
	return withRemedy(errors.New(handedOver+", and may still need its memory on this host"),
		remedyUndecided(rec.ID))
}

// remedyUndecided says what to do about a VM that was handed over by a migration that does not say where the VM is.
func remedyUndecided(id string) string {
	return "see 'migrated status " + id + "'; where the migration has failed, find out on both hosts where the VM " +
		"runs, then run here: " + releaseCommand(id) + " if it is at the destination, or " + fallBackCommand(id) +
		" if it certainly runs nowhere"
}
