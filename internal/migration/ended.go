// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/pkg/postcopy"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// exitTimeout is how long a QEMU may take to end after it has closed its monitor: it writes to its disks, and gives all
// of its memory back.
const exitTimeout = 10 * time.Second

// An endedError says that the VM ended by itself after the switch, as any VM may. Its memory is of no use any more.
type endedError struct {
	reason migratedv1.Reason
	said   string // in words
}

func (e *endedError) Error() string { return "the VM ended by itself on the destination: " + e.said }

// endings are what QEMU's event SHUTDOWN says of the end of a VM. A reason has the same words wherever it stands: it is
// all that is kept, and told to the source.
var endings = map[string]endedError{
	"guest-shutdown": {migratedv1.Reason_REASON_GUEST_SHUTDOWN, "its guest powered off"},
	"guest-reset":    {migratedv1.Reason_REASON_GUEST_RESET, "its guest reset, and QEMU was told to end then"},
	"guest-panic":    {migratedv1.Reason_REASON_GUEST_PANIC, "its guest panicked"},
	"host-qmp-quit":  {migratedv1.Reason_REASON_QEMU_QUIT, "somebody had its QEMU quit"},
	"host-ui":        {migratedv1.Reason_REASON_QEMU_QUIT, "somebody had its QEMU quit"},
	"host-signal":    {migratedv1.Reason_REASON_QEMU_SIGNALLED, "somebody ended its QEMU by a signal"},
}

// endingOf is what an event SHUTDOWN says.
func endingOf(said *qemu.Ending) *endedError {
	if known, ok := endings[said.Reason]; ok {
		return &known
	}
	return &endedError{migratedv1.Reason_REASON_QEMU_SHUTDOWN, fmt.Sprintf("QEMU says %q", said.Reason)}
}

// endingKept is the ending whose reason a daemon that is no more has written down.
func endingKept(reason migratedv1.Reason) *endedError {
	for _, known := range endings {
		if known.reason == reason {
			return &known
		}
	}
	return &endedError{reason, "an earlier run of this daemon saw it"}
}

// isEnding says whether a reason is one of those of a VM that ended by itself.
func isEnding(reason migratedv1.Reason) bool {
	return reason >= migratedv1.Reason_REASON_GUEST_SHUTDOWN && reason <= migratedv1.Reason_REASON_QEMU_SHUTDOWN
}

// afterEnding is what to do about a VM that has ended: nothing, and above all not what would be wrong.
const afterEnding = "nothing has to be done; to have the VM again, start it from its disks, which are as it left them on the destination"

// whereEnded is where a VM is that has ended.
var whereEnded = whereabouts{
	migratedv1.Location_LOCATION_ENDED, "the VM has ended on the destination, and what the source had of it is older than its disks",
}

// endingHere is how the VM ended here, if it ran here and QEMU has said that it ended; nil else. It waits for the end of
// a QEMU that is about to end. The caller holds mu.
func (d *Destination) endingHere(failure error) *endedError {
	if d.vm == nil || d.phase != running {
		return nil
	}
	if d.vm.QMP.Err() == nil && !errors.Is(failure, postcopy.ErrProcessGone) {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), exitTimeout)
	defer cancel()
	select { // what it has said is known when this has ended
	case <-d.vm.QMP.Done():
	case <-ctx.Done():
	}
	said := d.vm.Ending()
	if said == nil || d.vm.WaitExit(ctx) != nil {
		return nil
	}
	// A VM that was moved paused, or that QEMU was told to run and did not, has left its disks alone: it can go on at
	// the source, and was not ended by itself.
	if h := d.kept.header(); !said.Guest && (h.resumed.Load() == 0 || h.paused.Load() != 0) {
		return nil
	}
	return endingOf(said)
}

// ended says how the VM ended, to the source as well, also when this daemon is started again. The caller holds mu.
func (d *Destination) ended(how *endedError) {
	d.log.Info("the VM ended by itself", "reason", how.reason)
	d.kept.header().ended.Store(uint64(how.reason))
	if d.answer == nil { // Run is repeated, perhaps, by a source that heard nothing
		d.knowAnswer()
	}
	d.showEnded(how)
	reached("destination-ended")
}

// showEnded is shown of a VM that ended so, at either end.
func (t *Tracker) showEnded(how *endedError) {
	t.fail(migratedv1.MigrationState_MIGRATION_STATE_ENDED, withRemedy(withReason(how, how.reason), afterEnding), whereEnded)
}

// followEnding ends a migration whose VM ended by itself: what is left of it here is ended, too.
func (s *Source) followEnding(how *endedError) {
	s.unwatch()
	s.log.Info("the VM ended by itself on the destination", "reason", how.reason)
	s.letGoOf(how.reason)
	s.showEnded(how)
}

// toldEnding is the ending that a destination tells of; nil: none.
func toldEnding(shown *migratedv1.MigrationError) *endedError {
	if !isEnding(shown.GetReason()) {
		return nil
	}
	known := endingKept(shown.GetReason())
	if known.reason == migratedv1.Reason_REASON_QEMU_SHUTDOWN {
		known.said = "the destination says: " + shown.GetMessage()
	}
	return known
}
