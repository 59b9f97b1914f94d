// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// How long the VM may stand still where its migration does not say. The switch takes milliseconds; QEMU 11.1 takes a
// second to load the state of sixteen devices behind ports of their own, and more for each that is added.
const (
	defaultFreeze     = 10 * time.Second
	shortestFreeze    = 100 * time.Millisecond
	longestFreeze     = 2 * time.Minute
	defaultEarlyPause = time.Second
	longestEarlyPause = time.Minute
)

// CheckBudgets says what is wrong with the times of a specification.
func CheckBudgets(spec *migratedv1.MigrationSpec) error {
	var errs []error
	for _, b := range []struct {
		name        string
		value       *durationpb.Duration
		least, most time.Duration
	}{
		{"freeze_limit", spec.GetFreezeLimit(), shortestFreeze, longestFreeze},
		{"early_pause_limit", spec.GetEarlyPauseLimit(), 0, longestEarlyPause},
	} {
		if d := b.value.AsDuration(); b.value != nil && (!b.value.IsValid() || d < b.least || d > b.most) {
			errs = append(errs, fmt.Errorf("%s: %v is not from %v to %v", b.name, d, b.least, b.most))
		}
	}
	return errors.Join(errs...)
}

// freezeLimit bounds how long the VM stands still before the source continues it, unless the destination was told to
// run it by then. A peer may have sent spec.
func freezeLimit(spec *migratedv1.MigrationSpec) time.Duration {
	if spec.GetFreezeLimit() == nil {
		return defaultFreeze
	}
	return min(max(spec.GetFreezeLimit().AsDuration(), shortestFreeze), longestFreeze)
}

// earlyPauseLimit is how long the VM may have stood still for the early load until it is not tried again.
func earlyPauseLimit(spec *migratedv1.MigrationSpec) time.Duration {
	if spec.GetEarlyPauseLimit() == nil {
		return defaultEarlyPause
	}
	return spec.GetEarlyPauseLimit().AsDuration()
}
