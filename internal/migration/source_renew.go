// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/migrated-vm/migrated/internal/qemu"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

const (
	// earlyOldest is how old an early state may be when the VM stops. A younger one has changed little.
	earlyOldest = 2 * time.Minute
	// renewals is how often a migration is prepared afresh until somebody has to leave the VM's devices alone.
	renewals = 3
)

// renew prepares the migration afresh, while the VM runs, where what was prepared is out of date: the early state is old,
// or the VM has other devices.
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

// prepareAfresh prepares the migration once more, while the VM runs, after the destination was told to give up. pause is for
// how long the VM stood still for what was in vain; it is shown with all other pauses.
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

// outdated says why what was prepared is not of the VM as it is now.
func (s *Source) outdated(ctx context.Context) (why, err error) {
	ctx, cancel := context.WithTimeout(ctx, attachTimeout)
	defer cancel()
	now, err := s.vm.UserDevices(ctx)
	if err != nil {
		return nil, fmt.Errorf("ask QEMU for the VM's devices: %w", err)
	}
	if !slices.Equal(now, s.devices) {
		return fmt.Errorf("the VM's devices are others than when it was prepared: plugged since %q, unplugged %q",
			without(now, s.devices), without(s.devices, now)), nil
	}
	if age := time.Since(s.earlyAt); s.early != nil && age > earlyOldest {
		return fmt.Errorf("the early state of the devices is %v old", age.Round(time.Second)), nil
	}
	return nil, nil
}

// without returns what is in list and not in other.
func without(list, other []string) []string {
	return slices.DeleteFunc(slices.Clone(list), func(s string) bool { return slices.Contains(other, s) })
}

// reset lets go of all that prepare has made.
func (s *Source) reset() {
	s.release()
	s.vm, s.ram, s.export, s.conn, s.peer, s.claim = nil, nil, nil, nil, nil, qemu.Identity{}
	s.early, s.loaded, s.unguard = nil, nil, nil
	s.stopped, s.stopTried, s.gaveUpDisks, s.toldToRun = make(chan struct{}), false, false, false
	s.resumed, s.resumes = make(chan struct{}), nil
}
