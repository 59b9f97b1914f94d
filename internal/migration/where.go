// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"fmt"
	"time"

	"github.com/migrated-vm/migrated/internal/qemu"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// locateTimeout bounds how long a QEMU may take to report the run state of its VM.
const locateTimeout = 2 * time.Second

// A whereabouts is where a VM is, as far as this daemon has just found out.
type whereabouts struct {
	location migratedv1.Location
	words    string // a clause for the operator
}

// locateVM asks the VM's process and its QEMU, now, for the state of the VM on this host, which is its source. runState
// is QEMU's name for it; it is empty where QEMU did not answer or has ended.
func locateVM(vm *qemu.VM) (location migratedv1.Location, runState, words string) {
	const here = migratedv1.Location_LOCATION_SOURCE
	if vm.Ended() {
		return migratedv1.Location_LOCATION_ENDED, "", endedStatus
	}
	ctx, cancel := context.WithTimeoutCause(
		context.Background(), locateTimeout, fmt.Errorf("not within %v", locateTimeout))
	defer cancel()
	runState, err := vm.Status(ctx)
	switch {
	case err != nil && vm.Ended():
		return migratedv1.Location_LOCATION_ENDED, "", endedStatus
	case err != nil:
		return here, "", fmt.Sprintf("whether the VM runs on the source is not known: "+
			"its QEMU, process %d, is alive but does not answer (%v)", vm.Pid, err)
	}
	switch {
	case runState == "running":
		words = "the VM runs on the source"
	case runState == "paused", runState == "prelaunch":
		words = "the VM is paused on the source"
	case runState == "suspended":
		words = "the VM is on the source, and its guest sleeps"
	case hasStoppedItself(runState):
		words = fmt.Sprintf("the VM is on the source, and has stopped by itself: QEMU says %q", runState)
	default:
		words = fmt.Sprintf("the VM is on the source, and does not run: QEMU says %q", runState)
	}
	return here, runState, words
}

// hasStoppedItself reports whether a VM in this run state of QEMU's stands still although nobody has paused it.
func hasStoppedItself(runState string) bool {
	switch runState {
	case "io-error", "internal-error", "guest-panicked", "watchdog", "shutdown", "suspended":
		return true
	}
	return false
}

// whereBeforeCommit returns where the VM is before the commit point. It appends note, which comes from continueVM. Call
// it after everything else that this daemon does to the VM.
func (s *Source) whereBeforeCommit(note string) whereabouts {
	if s.vm == nil {
		return whereabouts{migratedv1.Location_LOCATION_UNKNOWN, "the VM was not touched" + note}
	}
	location, runState, words := locateVM(s.monitor())
	switch {
	case location == migratedv1.Location_LOCATION_ENDED:
	case s.stopTried() && !s.wasRunning && runState == "paused":
		words += ", as it was before"
	case s.stopTried():
	case s.noEarlyReason != nil: // startOver
		words = "the VM was continued on the source after its first stop, and was not touched since; " + words
	default:
		words = "the VM was not touched; " + words
	}
	return whereabouts{location, words + note}
}

// whereAfterCommit returns where the VM is after the commit point, as far as this host can tell without asking the
// destination.
func (s *Source) whereAfterCommit() whereabouts {
	where := whereabouts{migratedv1.Location_LOCATION_UNKNOWN, "the VM was handed over"}
	if s.confirmedRun() {
		where = whereabouts{migratedv1.Location_LOCATION_DESTINATION, "the destination said that it runs the VM"}
	}
	if s.vm == nil {
		return where
	}
	location, runState, words := locateVM(s.vm)
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

// whereNeverRun is the location that a destination reports when it was not told to run the VM. It knows no more than
// that.
var whereNeverRun = whereabouts{migratedv1.Location_LOCATION_UNKNOWN, "the VM was never run on the destination"}

// qemuAlive reports whether the destination's QEMU process is alive. It returns true where that is not known: the
// source must not run a VM that may run here. The caller holds mu.
func (d *Destination) qemuAlive() bool {
	if d.vm == nil {
		return d.left.Alive() // the QEMU that an earlier run of the daemon left, if any
	}
	return !d.vm.Ended()
}

// whereWaiting returns where the VM is while its pages do not arrive.
func (d *Destination) whereWaiting() whereabouts {
	switch {
	case !d.toldToRun():
		return whereabouts{migratedv1.Location_LOCATION_UNKNOWN, "the VM was not run on the destination yet"}
	case d.kept.header().resumed.Load() == 0:
		return whereabouts{
			migratedv1.Location_LOCATION_UNKNOWN,
			"the destination QEMU was told to run the VM, and it is not known whether the VM runs",
		}
	}
	return whereabouts{
		migratedv1.Location_LOCATION_DESTINATION, "the VM is on the destination; threads that touch missing pages wait",
	}
}

// whereFailed returns where the VM is when the destination was told to run it and cannot go on. The caller holds mu.
func (d *Destination) whereFailed() whereabouts {
	switch {
	case d.qemuAlive():
		return d.whereWaiting()
	case d.orphan:
		return whereabouts{
			migratedv1.Location_LOCATION_ENDED, "the VM's QEMU has ended on both hosts",
		}
	}
	return whereabouts{
		migratedv1.Location_LOCATION_NOWHERE,
		"the VM's QEMU on the destination has ended; " +
			"the source may still have the VM's memory as it was at the switch",
	}
}

// whereFailedThere returns where the VM is when the destination, or the connection to it, has failed for good. It
// combines what the destination reported last with what this host finds out now.
func (s *Source) whereFailedThere() whereabouts {
	where := s.whereAfterCommit()
	view, _ := s.Snapshot()
	if view.GetLocation() == migratedv1.Location_LOCATION_NOWHERE &&
		where.location == migratedv1.Location_LOCATION_DESTINATION {
		where.location = view.GetLocation()
		where.words = "the destination says that the VM's QEMU there has ended; " + where.words
	}
	return where
}
