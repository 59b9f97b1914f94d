// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// errAbandoned is the final error of a migration whose operator declared the source gone.
var errAbandoned = errors.New("an operator declared the source gone (migrated abandon): " +
	"the VM was ended, because the rest of its memory could not arrive")

// Abandon ends a VM that waits for memory of a source that is gone for good. The operator asserts that it is gone.
// Abandon fails while pages still arrive. It returns when QEMU has ended.
func (d *Destination) Abandon(ctx context.Context) error {
	if err := d.mayAbandon(ctx); err != nil {
		return err
	}
	d.cancel(errAbandoned)
	select { // pump ends QEMU
	case <-d.done:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	view, _ := d.Snapshot()
	switch {
	case view.GetError().GetReason() == migratedv1.Reason_REASON_ABANDONED:
		return nil
	case view.GetState() != migratedv1.MigrationState_MIGRATION_STATE_FAILED:
		return errors.New("the migration ended meanwhile: see its status")
	}
	// The migration had failed before and was left to its operator.
	facts, err := readKept(d.cfg.Dir)
	if errors.Is(err, fs.ErrNotExist) && d.step() == lost { // its QEMU had ended, and nothing was kept of it
		d.moveTo(abandoned)
		d.showAbandoned()
		return nil
	}
	if err != nil {
		return fmt.Errorf("find the QEMU that the VM was moved to: %w", err)
	}
	d.left, d.vm = facts.QEMU, nil // that connection is closed
	d.abandon()
	return d.kept.remove()
}

// mayAbandon refuses to end a VM that can still get its memory: a source that serves pages is not gone.
func (d *Destination) mayAbandon(ctx context.Context) error {
	if !d.toldToRun() {
		return withRemedy(errors.New("the VM was not run here"),
			"cancel the migration at its source; this host also gives it up by itself")
	}
	view, _ := d.Snapshot()
	switch view.GetState() {
	case migratedv1.MigrationState_MIGRATION_STATE_FAILED: // this daemon fetches no more memory, whoever serves it
		return nil
	case migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_PAUSED,
		migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_RECOVER:
		if view.GetError().GetReason() == migratedv1.Reason_REASON_SOURCE_QEMU_ENDED {
			return nil // the source serves only the memory in files
		}
		ctx, cancel := context.WithTimeout(ctx, askTimeout)
		defer cancel()
		if l, err := openLanes(ctx, d.laneConfig()); err == nil {
			l.close()
			return withRemedy(errors.New("the source serves the memory of the VM"),
				"fetch the memory: migrated recover "+d.cfg.Request.GetId())
		}
		return nil
	case migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, migratedv1.MigrationState_MIGRATION_STATE_ENDED:
		return errOver
	}
	return withRemedy(errors.New("the connection to the source is not lost: the VM's memory is still arriving"),
		"wait for the migration to complete")
}

// abandon ends the VM. The caller holds mu.
func (d *Destination) abandon() {
	d.moveTo(abandoned)
	d.log.Warn("abandoned: the VM ends", "reason", errAbandoned)
	if d.vm != nil { // QEMU may still have to write to its disks
		ctx, cancel := context.WithTimeout(context.Background(), killTimeout)
		defer cancel()
		if err := d.vm.Quit(ctx); err != nil {
			d.log.Error("cannot end the destination QEMU", "error", err)
		}
	} else {
		d.endQEMU()
	}
	d.showAbandoned()
}

// showAbandoned shows that the operator gave the VM up, and where it is. The caller holds mu.
func (d *Destination) showAbandoned() {
	where := whereabouts{
		migratedv1.Location_LOCATION_ENDED, "the VM was ended on the destination; its disks are as it left them there",
	}
	if d.qemuAlive() {
		where = whereabouts{
			migratedv1.Location_LOCATION_DESTINATION,
			"the VM's QEMU on the destination was to be ended, and may still be alive",
		}
	}
	d.fail(migratedv1.MigrationState_MIGRATION_STATE_FAILED,
		withRemedy(withReason(errAbandoned, migratedv1.Reason_REASON_ABANDONED), "start the VM anew from its disks"), where)
}

// withAbandonRemedy adds the abandon command to the remedy of an error: pages may never come.
func (d *Destination) withAbandonRemedy(err error) error {
	if !d.toldToRun() {
		return err
	}
	return withRemedy(err,
		Remedy(err)+"; if the source is lost for good, and the memory of the VM with it: "+d.abandonCommand())
}

func (d *Destination) abandonCommand() string {
	return "migrated abandon " + d.cfg.Request.GetId() + " --source-is-gone"
}
