// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"fmt"
	"time"

	"github.com/migrated-vm/migrated/internal/qemu"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// lookTimeout is how long a QEMU may take to say what its VM does.
const lookTimeout = 2 * time.Second

// A whereabouts says where a VM is, as far as was found out just now.
type whereabouts struct {
	location migratedv1.Location
	words    string
}

// look asks the process and its QEMU, now, what has become of the VM on this host, which is its source.
func look(vm *qemu.VM) (location migratedv1.Location, runState, words string) {
	const here = migratedv1.Location_LOCATION_SOURCE
	if vm.Ended() {
		return migratedv1.Location_LOCATION_ENDED, "", endedStatus
	}
	ctx, cancel := context.WithTimeoutCause(context.Background(), lookTimeout, fmt.Errorf("not within %v", lookTimeout))
	defer cancel()
	runState, err := vm.Status(ctx)
	switch {
	case err != nil && vm.Ended():
		return migratedv1.Location_LOCATION_ENDED, "", endedStatus
	case err != nil:
		return here, "", fmt.Sprintf("whether the VM runs on the source is not known: its QEMU, process %d, lives and does not answer (%v)",
			vm.Pid, err)
	}
	switch runState {
	case "running":
		words = "the VM runs on the source"
	case "paused", "prelaunch":
		words = "the VM is paused on the source"
	case "suspended":
		words = "the VM is on the source, and its guest sleeps"
	case "io-error", "internal-error", "guest-panicked", "watchdog", "shutdown":
		words = fmt.Sprintf("the VM is on the source, and has stopped by itself: QEMU says %q", runState)
	default:
		words = fmt.Sprintf("the VM is on the source, and does not run: QEMU says %q", runState)
	}
	return here, runState, words
}

// whereNow is where the VM is before the commit point, with the note that continueVM has left. It is asked when all that
// this daemon did is done.
func (s *Source) whereNow(note string) whereabouts {
	if s.vm == nil {
		return whereabouts{migratedv1.Location_LOCATION_UNKNOWN, "the VM was not touched" + note}
	}
	location, runState, words := look(s.monitor())
	switch {
	case location == migratedv1.Location_LOCATION_ENDED:
	case s.stopTried && !s.wasRunning && runState == "paused":
		words += ", as it was before"
	case s.stopTried:
	case s.notEarly != nil: // startOver
		words = "the VM was continued on the source after its first stop, and was not touched since; " + words
	default:
		words = "the VM was not touched; " + words
	}
	return whereabouts{location, words + note}
}

// whereHandedOver is where the VM is after the commit point, as far as this host can tell without the destination.
func (s *Source) whereHandedOver() whereabouts {
	where := whereabouts{migratedv1.Location_LOCATION_UNKNOWN, "the VM was handed over"}
	if s.runsThere.Load() {
		where = whereabouts{migratedv1.Location_LOCATION_DESTINATION, "the destination said that it runs the VM"}
	}
	if s.vm == nil {
		return where
	}
	location, runState, words := look(s.vm)
	switch {
	case location == migratedv1.Location_LOCATION_ENDED:
		where.words = words
	case runState == "running":
		where = whereabouts{location, words + ", where somebody has continued it; it may run on the destination, too"}
	case runState == "":
		where.words = words
	default:
		where.words = "the VM is stopped on the source with its memory as it was at the switch"
	}
	return where
}

// neverRun is what a destination says that was not told to run the VM: it knows no more.
var neverRun = whereabouts{migratedv1.Location_LOCATION_UNKNOWN, "the VM was never run on the destination"}

// livesHere says whether the destination's QEMU does. The caller holds mu.
func (d *Destination) livesHere() bool {
	if d.vm == nil {
		return d.left.Alive() // an earlier run of the daemon left it, if there is one
	}
	return !d.vm.Ended()
}

// whereWaiting is where the VM is whose pages do not come.
func (d *Destination) whereWaiting() whereabouts {
	switch {
	case d.fate.Load() != toldToRun:
		return whereabouts{migratedv1.Location_LOCATION_UNKNOWN, "the VM was not run on the destination yet"}
	case d.kept.header().resumed.Load() == 0:
		return whereabouts{
			migratedv1.Location_LOCATION_UNKNOWN,
			"the destination QEMU was told to run the VM, and it is not known whether it has",
		}
	}
	return whereabouts{
		migratedv1.Location_LOCATION_DESTINATION, "the VM is on the destination; what needs a missing page waits",
	}
}

// whereFailed is where the VM is when the destination, which was told to run it, cannot go on. The caller holds mu.
func (d *Destination) whereFailed() whereabouts {
	switch {
	case d.livesHere():
		return d.whereWaiting()
	case d.orphan:
		return whereabouts{
			migratedv1.Location_LOCATION_ENDED, "the VM's QEMU on the destination has ended; the source's has, too",
		}
	}
	return whereabouts{
		migratedv1.Location_LOCATION_NOWHERE,
		"the VM's QEMU on the destination has ended; its memory as it was at the switch is with the source, if that has it still",
	}
}

// whereFailedThere is where the VM is when the destination, or the way to it, has failed for good: what it said last,
// beside what is found here.
func (s *Source) whereFailedThere() whereabouts {
	where := s.whereHandedOver()
	view, _ := s.Snapshot()
	if view.GetLocation() == migratedv1.Location_LOCATION_NOWHERE && where.location == migratedv1.Location_LOCATION_DESTINATION {
		where.location = view.GetLocation()
		where.words = "the destination says that the VM's QEMU there has ended; " + where.words
	}
	return where
}
