// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"

	"github.com/migrated-vm/migrated/internal/qemu"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// errFallBack is the final error of a migration that its operator ended by FallBack.
var errFallBack = errors.New("an operator declared the destination gone (migrated fallback): " +
	"the VM is on the source again, as it was at the switch")

// errDeclaring is why this daemon does no more for a migration: FallBack or Release has begun. They show the outcome.
var errDeclaring = withRemedy(errors.New("an operator has begun to end the migration (migrated fallback or release), "+
	"and that has not succeeded yet"), "remove the cause that the command named, and repeat the command; or restart this "+
	"daemon: it goes on with the migration")

// FallBack continues a VM that was handed over, as it was at the switch, because its destination is gone. The caller
// has to know that the VM runs nowhere else. If the destination answers, its answer decides instead. FallBack returns
// when the VM runs here.
func (s *Source) FallBack(ctx context.Context) error {
	s.declareMu.Lock()
	defer s.declareMu.Unlock()
	if err := s.mayFallBack(); err != nil {
		return err
	}
	if err := s.checkGone(ctx); err != nil {
		return err
	}
	if err := s.endFor(ctx, errDeclaring); err != nil {
		return err
	}
	if err := s.mayFallBack(); err != nil { // it may have ended at this moment
		return err
	}
	where, err := s.continueHandedOver(ctx)
	if err != nil {
		return withRemedy(fmt.Errorf("continue the VM here: %w", err), "remove the cause and try again; if the VM runs at "+
			"the destination after all, restart this host's daemon: the destination gets the VM's memory again")
	}
	s.clearCommit()
	s.removeRecord()
	s.log.Warn("fell back: the VM is here as it was at the switch", "where", where.words)
	s.fail(migratedv1.MigrationState_MIGRATION_STATE_FAILED, errFallBack, where)
	return nil
}

// mayFallBack fails if this daemon knows that the VM is not to be continued here.
func (s *Source) mayFallBack() error {
	switch view, _ := s.Snapshot(); view.GetState() {
	case migratedv1.MigrationState_MIGRATION_STATE_COMPLETED:
		return errors.New("the migration completed: the whole VM is at the destination")
	case migratedv1.MigrationState_MIGRATION_STATE_ENDED:
		return withRemedy(errors.New("the VM has ended at the destination; its disks are newer than its memory here"),
			afterEnding)
	}
	if !s.isCommitted() {
		return withRemedy(errors.New("the VM has not been handed over"), "cancel the migration")
	}
	return nil
}

// checkGone fails if the destination answers, and has the VM or has had its end, or does not say.
func (s *Source) checkGone(ctx context.Context) error {
	answer, err := s.askDestination(ctx)
	if err != nil && Remedy(err) == "" {
		err = withRemedy(err, "see on the destination why it answers so; if its VM is gone for certain, stop the daemon "+
			"there, then try again")
	}
	if answer == nil {
		return err
	}
	destination, look := s.cfg.Spec.GetDestination(), "look there with 'migrated status "+s.cfg.ID+"'"
	switch state := answer.GetState(); {
	case endingFromDestination(answer.GetError()) != nil, state == migratedv1.MigrationState_MIGRATION_STATE_ENDED:
		return withRemedy(fmt.Errorf("destination %s answers that the VM has ended there", destination), afterEnding)
	case state == migratedv1.MigrationState_MIGRATION_STATE_COMPLETED:
		return withRemedy(fmt.Errorf("destination %s answers that it has the whole VM", destination), look)
	case !Terminal(state) || answer.GetLocation() == migratedv1.Location_LOCATION_DESTINATION:
		return withRemedy(fmt.Errorf("destination %s answers, and has the VM", destination),
			look+"; to have the VM here, first end its QEMU there, then restart the daemon there: it reports the end")
	}
	return nil
}

// announce has the VM's network cards announce that they are here again, because the destination may have announced
// them there.
func (s *Source) announce(ctx context.Context, vm *qemu.VM) {
	wait, err := vm.BeginAnnouncing(ctx)
	if err == nil {
		err = wait(ctx)
	}
	if err != nil {
		s.log.Warn("the VM's network cards were not announced; the network finds out when the VM sends", "error", err)
	}
}

// fallBackCommand returns the command line for FallBack.
func (s *Source) fallBackCommand() string { return fallBackCommand(s.cfg.ID) }

func fallBackCommand(id string) string { return "migrated fallback " + id + " --destination-is-gone" }

// attachHandedOver connects to the QEMU that the VM was handed over from, as the record of this migration names it: its
// monitor may be another QEMU's by now, whose VM was perhaps handed over by another migration. The caller closes the
// connection.
func (s *Source) attachHandedOver(ctx context.Context) (*qemu.VM, error) {
	rec, found, err := s.cfg.Records.find(s.cfg.ID)
	if err != nil {
		return nil, err
	}
	if !found || !rec.Committed {
		return nil, fmt.Errorf("there is no record that the VM of migration %s was handed over from here", s.cfg.ID)
	}
	vm, err := attachSame(ctx, s.cfg.Spec.GetVm(), rec.Identity)
	if err != nil {
		return nil, fmt.Errorf("attach to the VM that was handed over: %w", err)
	}
	return vm, nil
}

// continueHandedOver continues the VM of the record, and returns where it is then.
func (s *Source) continueHandedOver(ctx context.Context) (where whereabouts, err error) {
	vm, err := s.attachHandedOver(ctx)
	if err != nil {
		return where, err
	}
	s.removeContLock(ctx, vm)
	switch {
	case s.wasRunning:
		if _, err = vm.Cont(ctx); err == nil {
			s.announce(ctx, vm)
		}
	default: // it stays paused, but needs its disks to be moved again; QEMU before 10.0 takes them only on cont
		_, err = vm.ActivateDisks(ctx)
	}
	if err == nil {
		where.location, _, where.words = locateVM(vm)
	}
	if closeErr := vm.Close(); closeErr != nil { // no failure: the VM was continued, or err says why not
		s.log.Warn("cannot disconnect from QEMU", "error", closeErr)
	}
	return where, err
}
