// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// How long the VM may stand still: the default, the shortest and the longest that a specification may ask for. The
// switch takes milliseconds. QEMU 11.1 takes a second to load the state of sixteen devices that each have a port of
// their own, and more for each device that is added.
const (
	defaultFreeze     = 10 * time.Second
	shortestFreeze    = 100 * time.Millisecond
	longestFreeze     = 2 * time.Minute
	defaultEarlyPause = time.Second
	longestEarlyPause = time.Minute

	// Bounds for the limits of a whole migration, see deadlines.go.
	shortestLimit   = time.Second
	longestPrepared = time.Hour
	longestSwitch   = 24 * time.Hour
	longestTotal    = 7 * 24 * time.Hour
)

// CheckBudgets returns an error that names every time limit of spec that is out of its range; nil: all are in range.
func CheckBudgets(spec *migratedv1.MigrationSpec) error {
	var errs []error
	for _, b := range []struct {
		name        string
		value       *durationpb.Duration
		least, most time.Duration
	}{
		{"freeze_limit", spec.GetFreezeLimit(), shortestFreeze, longestFreeze},
		{"early_pause_limit", spec.GetEarlyPauseLimit(), 0, longestEarlyPause},
		{"prepare_limit", spec.GetPrepareLimit(), shortestLimit, longestPrepared},
		{"switch_limit", spec.GetSwitchLimit(), shortestLimit, longestSwitch},
		{"total_limit", spec.GetTotalLimit(), shortestLimit, longestTotal},
	} {
		if d := b.value.AsDuration(); b.value != nil && (!b.value.IsValid() || d < b.least || d > b.most) {
			errs = append(errs, fmt.Errorf("%s: %v is not from %v to %v", b.name, d, b.least, b.most))
		}
	}
	return errors.Join(errs...)
}

// freezeLimit returns how long the VM may stand still before the source continues it, unless the destination was told
// to run it by then. The value is clamped to the allowed range, because spec may come from a peer that did not check
// it.
func freezeLimit(spec *migratedv1.MigrationSpec) time.Duration {
	if spec.GetFreezeLimit() == nil {
		return defaultFreeze
	}
	return min(max(spec.GetFreezeLimit().AsDuration(), shortestFreeze), longestFreeze)
}

// earlyPauseLimit returns how long the VM may stand still for early loads in all. After that the source makes no
// further attempt.
func earlyPauseLimit(spec *migratedv1.MigrationSpec) time.Duration {
	if spec.GetEarlyPauseLimit() == nil {
		return defaultEarlyPause
	}
	return spec.GetEarlyPauseLimit().AsDuration()
}
