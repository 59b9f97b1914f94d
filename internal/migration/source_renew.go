// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

const (
	// earlyOldest is how old an early state may be when the VM stops. Until then it has changed little.
	earlyOldest = 2 * time.Minute
	// renewals is how often a migration is prepared afresh before it fails because the VM's devices keep changing.
	renewals = 3
)

// renew prepares the migration afresh while the VM runs, if what was prepared is out of date: the early state is old,
// or the VM's devices have changed.
func (s *Source) renew(ctx context.Context) error {
	for range renewals {
		why, err := s.outdated(ctx)
		if why == nil || err != nil {
			return err
		}
		s.log.Info("preparing afresh", "reason", why)
		s.tellToGiveUp(ctx, why)
		s.update(func(m *migratedv1.Migration) { m.Prepared = false })
		if err := s.prepareAfresh(ctx, 0); err != nil {
			return fmt.Errorf("prepare afresh, as %w: %w", why, err)
		}
		s.update(func(m *migratedv1.Migration) { m.Prepared = true })
	}
	why, err := s.outdated(ctx)
	if why != nil {
		err = withRemedy(why, "leave the VM's devices alone while it is migrated")
	}
	return err
}

// prepareAfresh prepares the migration once more while the VM runs. The destination was told to give up before. pause
// is how long the VM stood still for the attempt that failed; it is shown as part of the sum of all pauses.
func (s *Source) prepareAfresh(ctx context.Context, pause time.Duration) error {
	s.reset()
	s.update(func(m *migratedv1.Migration) {
		pause += m.GetEarlyLoad().GetPause().AsDuration()
		m.State, m.Location = migratedv1.MigrationState_MIGRATION_STATE_SETUP, migratedv1.Location_LOCATION_SOURCE
	})
	if err := s.prepare(ctx); err != nil {
		return err
	}
	s.update(func(m *migratedv1.Migration) {
		m.EarlyLoad.Pause = durationpb.New(pause + m.EarlyLoad.GetPause().AsDuration())
	})
	return nil
}

// outdated returns, as why, what has changed about the VM since it was prepared; nil: nothing.
func (s *Source) outdated(ctx context.Context) (why, err error) {
	ctx, cancel := context.WithTimeout(ctx, attachTimeout)
	defer cancel()
	now, err := s.vm.UserDevices(ctx)
	if err != nil {
		return nil, fmt.Errorf("ask QEMU for the VM's devices: %w", err)
	}
	if !slices.Equal(now, s.devices) {
		return fmt.Errorf("the VM's devices have changed since the migration was prepared: plugged in %q, unplugged %q",
			without(now, s.devices), without(s.devices, now)), nil
	}
	if age := time.Since(s.earlySavedAt); s.earlyState != nil && age > earlyOldest {
		return fmt.Errorf("the early state of the devices is %v old", age.Round(time.Second)), nil
	}
	return nil, nil
}

// without returns the strings of list that are not in other.
func without(list, other []string) []string {
	return slices.DeleteFunc(slices.Clone(list), func(s string) bool { return slices.Contains(other, s) })
}

// reset begins another attempt. The VM runs.
func (s *Source) reset() {
	s.release()
	s.attempt = newAttempt()
	s.moveTo(notStopped)
}
