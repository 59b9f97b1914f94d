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

// exitTimeout is how long a QEMU may take to end after it has closed its monitor. It writes to its disks and frees
// its memory meanwhile.
const exitTimeout = 10 * time.Second

// An endedError says that the VM ended by itself after the switch, as any VM may. The rest of its memory is not
// needed any more.
type endedError struct {
	reason migratedv1.Reason
	said   string // in words
}

func (e *endedError) Error() string { return "the VM ended by itself on the destination: " + e.said }

// endings are the reasons in QEMU's event SHUTDOWN. Each migrated Reason has one text, because the Reason alone is
// kept in the file and sent to the source.
var endings = map[string]endedError{
	"guest-shutdown": {migratedv1.Reason_REASON_GUEST_SHUTDOWN, "its guest powered off"},
	"guest-reset":    {migratedv1.Reason_REASON_GUEST_RESET, "its guest reset, and its QEMU ends on a reset"},
	"guest-panic":    {migratedv1.Reason_REASON_GUEST_PANIC, "its guest panicked"},
	"host-qmp-quit":  {migratedv1.Reason_REASON_QEMU_QUIT, "somebody had its QEMU quit"},
	"host-ui":        {migratedv1.Reason_REASON_QEMU_QUIT, "somebody had its QEMU quit"},
	"host-signal":    {migratedv1.Reason_REASON_QEMU_SIGNALLED, "somebody ended its QEMU by a signal"},
}

// endingOf returns the meaning of an event SHUTDOWN.
func endingOf(said *qemu.Ending) *endedError {
	if known, ok := endings[said.Reason]; ok {
		return &known
	}
	return &endedError{migratedv1.Reason_REASON_QEMU_SHUTDOWN, fmt.Sprintf("QEMU says %q", said.Reason)}
}

// endingForReason returns the ending for a reason that an earlier run of the daemon kept.
func endingForReason(reason migratedv1.Reason) *endedError {
	for _, known := range endings {
		if known.reason == reason {
			return &known
		}
	}
	return &endedError{reason, "an earlier run of this daemon saw it"}
}

// isEnding says whether a reason means that the VM ended by itself.
func isEnding(reason migratedv1.Reason) bool {
	return reason >= migratedv1.Reason_REASON_GUEST_SHUTDOWN && reason <= migratedv1.Reason_REASON_QEMU_SHUTDOWN
}

// afterEnding is the remedy for a VM that has ended: do not continue it from older memory.
const afterEnding = "nothing has to be done; to have the VM again, start it from its disks, " +
	"which are as it left them on the destination"

// whereEnded is the location of a VM that has ended.
var whereEnded = whereabouts{
	migratedv1.Location_LOCATION_ENDED,
	"the VM has ended on the destination, and its memory on the source is older than its disks",
}

// findEnding returns how the VM ended, if it ran here and QEMU has said that it ended; otherwise nil. It waits for a
// QEMU that is about to end. The caller holds mu.
func (d *Destination) findEnding(failure error) *endedError {
	if !d.toldToRun() {
		return nil
	}
	if d.vm == nil {
		return d.endingFromExitStatus()
	}
	if d.vm.QMP.Err() == nil && !errors.Is(failure, postcopy.ErrProcessGone) {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), exitTimeout)
	defer cancel()
	select { // after the connection ends, all that QEMU said has been read
	case <-d.vm.QMP.Done():
	case <-ctx.Done():
	}
	said := d.vm.Ending()
	if said == nil || d.vm.WaitExit(ctx) != nil {
		return nil
	}
	// The VM was moved paused, or QEMU was told to run it and did not. It has left its disks alone and can go on at
	// the source, so it did not end by itself.
	if !said.Guest && !d.hasRun() {
		return nil
	}
	return endingOf(said)
}

// hasRun reports whether the VM has run here: QEMU was told to run it, or somebody has continued a VM that was moved
// paused. The caller holds mu.
func (d *Destination) hasRun() bool {
	h := d.kept.header()
	return h.resumed.Load() != 0 && (h.paused.Load() == 0 || d.vm != nil && isClosed(d.vm.Continued()))
}

// followContinued records that somebody continues a VM that was moved paused: from then on its disks may be newer than
// what the source has.
func (d *Destination) followContinued(vm *qemu.VM) {
	select {
	case <-vm.Continued():
		d.noteContinued()
	case <-d.ctx.Done():
	}
}

// findContinued is followContinued for a VM that may have been continued while no daemon ran.
func (d *Destination) findContinued(vm *qemu.VM) {
	if running, err := vm.Running(d.ctx); err == nil && running {
		d.noteContinued()
		return
	}
	d.followContinued(vm)
}

func (d *Destination) noteContinued() {
	d.limitMu.Lock() // else the file could be closed meanwhile
	defer d.limitMu.Unlock()
	if !d.released {
		d.markContinued()
	}
}

// endingFromExitStatus returns how the VM ended if QEMU ended before this restarted daemon could connect to it. A
// QEMU that was told to end has exit status 0. nil: QEMU ended otherwise, or the kernel does not say.
func (d *Destination) endingFromExitStatus() *endedError {
	if d.exit == nil || d.left.Alive() {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), exitTimeout)
	defer cancel()
	status, err := d.exit.Status(ctx)
	if err != nil {
		d.log.Warn("how the destination QEMU ended is not known", "error", err)
		return nil
	}
	// A VM that was never continued here does not count: it has left its disks alone.
	if !status.Exited() || status.ExitStatus() != 0 || !d.hasRun() {
		return nil
	}
	return &endedError{
		migratedv1.Reason_REASON_QEMU_SHUTDOWN, "its QEMU exited with status 0, as if told to end, while no daemon ran",
	}
}

// noteEnded records how the VM ended: in the file for a restarted daemon, and for the source. The caller holds mu.
func (d *Destination) noteEnded(how *endedError) {
	d.log.Info("the VM ended by itself", "reason", how.reason)
	d.markEnded(how.reason)
	d.showEnded(how)
	testPoint("destination-ended")
}

// showEnded shows the end of a VM, at either host.
func (t *Tracker) showEnded(how *endedError) {
	t.fail(migratedv1.MigrationState_MIGRATION_STATE_ENDED,
		withRemedy(withReason(how, how.reason), afterEnding), whereEnded)
}

// followEnding ends the migration at the source after its VM ended by itself. It ends the source's QEMU, too.
func (s *Source) followEnding(how *endedError) {
	s.endWatch()
	s.log.Info("the VM ended by itself on the destination", "reason", how.reason)
	s.endSourceVM(how.reason, func() { s.showEnded(how) })
}

// endingFromDestination returns the ending that a destination reports. nil: it reports none.
func endingFromDestination(shown *migratedv1.MigrationError) *endedError {
	if !isEnding(shown.GetReason()) {
		return nil
	}
	known := endingForReason(shown.GetReason())
	if known.reason == migratedv1.Reason_REASON_QEMU_SHUTDOWN {
		known.said = "the destination says: " + shown.GetMessage()
	}
	return known
}
