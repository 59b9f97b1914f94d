// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/migrated-vm/migrated/internal/migration"
	"github.com/migrated-vm/migrated/internal/units"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// locationName returns where the VM is, in a word: "destination"; "-" of a daemon that does not say.
func locationName(l migratedv1.Location) string {
	if l == migratedv1.Location_LOCATION_UNSPECIFIED {
		return "-"
	}
	return migration.Name(l, "LOCATION_")
}

// locationText says the same in a sentence.
func locationText(m *migratedv1.Migration) string {
	switch m.GetLocation() {
	case migratedv1.Location_LOCATION_SOURCE:
		return "the VM is at the source"
	case migratedv1.Location_LOCATION_DESTINATION:
		return "the VM is at the destination"
	case migratedv1.Location_LOCATION_NOWHERE:
		return "the VM runs nowhere"
	case migratedv1.Location_LOCATION_ENDED:
		return "the VM has ended"
	default:
		if m.GetRole() == migratedv1.MigrationRole_MIGRATION_ROLE_DESTINATION {
			return "it is not known here where the VM is, the source may know"
		}
		return "it is not known where the VM is"
	}
}

// reasonName returns a reason as a program spells it: "guest-shutdown".
func reasonName(r migratedv1.Reason) string { return migration.Name(r, "REASON_") }

// stateMeaning says what a state means for the VM. Where that is, the daemon has found out.
func stateMeaning(m *migratedv1.Migration) string {
	switch m.GetState() {
	case migratedv1.MigrationState_MIGRATION_STATE_SETUP:
		switch {
		case m.GetPrepared():
			return "both sides are ready; " + locationText(m)
		case m.GetLocation() == migratedv1.Location_LOCATION_UNKNOWN: // nobody has looked yet
			return "both sides get ready"
		}
		return "both sides get ready; " + locationText(m)
	case migratedv1.MigrationState_MIGRATION_STATE_DEVICE:
		return "the state of the devices moves; " + locationText(m)
	case migratedv1.MigrationState_MIGRATION_STATE_HANDOVER:
		return "the destination was told to run the VM, and has not answered; " + locationText(m)
	case migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_ACTIVE:
		return locationText(m) + " and its memory follows"
	case migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_PAUSED:
		return locationText(m) + "; the connection to its memory is lost"
	case migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_RECOVER:
		return locationText(m) + "; the connection to its memory is made again"
	case migratedv1.MigrationState_MIGRATION_STATE_ENDED:
		return "the VM ended by itself at the destination"
	case migratedv1.MigrationState_MIGRATION_STATE_COMPLETED:
		return "the VM and all its memory are at the destination"
	case migratedv1.MigrationState_MIGRATION_STATE_FAILED:
		return "it ended with an error"
	case migratedv1.MigrationState_MIGRATION_STATE_CANCELLED:
		return "the migration was cancelled; " + locationText(m)
	case migratedv1.MigrationState_MIGRATION_STATE_REHEARSED:
		return "the rehearsal is over; " + locationText(m)
	default:
		return "a state that this program does not know"
	}
}

// supervisionText returns how the destination's userfaultfd is supervised, with
// its label: "labelled system_u:object_r:…"; nothing while there is none.
func supervisionText(m *migratedv1.Migration) string {
	name, label := migration.Name(m.GetSupervision(), "SUPERVISION_"), m.GetUserfaultfdLabel()
	switch {
	case m.GetSupervision() == migratedv1.Supervision_SUPERVISION_UNSPECIFIED:
		return ""
	case m.GetSupervision() == migratedv1.Supervision_SUPERVISION_LABELLED:
		return name + " " + label
	case label != "":
		return name + ", labelled " + label
	default:
		return name
	}
}

// earlyLoadText returns what was done with the devices' state before the VM stops; nothing while nothing was.
func earlyLoadText(e *migratedv1.EarlyLoad) string {
	switch {
	case e == nil:
		return ""
	case e.GetLoaded():
		return fmt.Sprintf("%s of device state in %s, for which the VM stood still for %s",
			bytesText(e.GetBytes()), durationText(e.GetLoadTime()), durationText(e.GetPause()))
	case e.GetPause().AsDuration() > 0:
		return fmt.Sprintf("no: %s; the VM stood still for %s", e.GetReason(), durationText(e.GetPause()))
	default:
		return "no: " + e.GetReason()
	}
}

// isTerminal reports whether a state is a migration's last.
func isTerminal(s migratedv1.MigrationState) bool {
	switch s {
	case migratedv1.MigrationState_MIGRATION_STATE_COMPLETED,
		migratedv1.MigrationState_MIGRATION_STATE_FAILED,
		migratedv1.MigrationState_MIGRATION_STATE_CANCELLED,
		migratedv1.MigrationState_MIGRATION_STATE_REHEARSED,
		migratedv1.MigrationState_MIGRATION_STATE_ENDED:
		return true
	default:
		return false
	}
}

// vmName returns the VM's name or, where it has none, its QMP socket.
func vmName(m *migratedv1.Migration) string {
	if m.GetVmName() != "" {
		return m.GetVmName()
	}
	return orDash(m.GetSpec().GetVm())
}

func orDash(s string) string { return orText(s, "-") }

// fraction returns how much of the memory is at the destination, 0 to 1.
func fraction(p *migratedv1.Progress) float64 {
	if p.GetPagesTotal() == 0 {
		return 0
	}
	return min(1, float64(p.GetPagesPresent())/float64(p.GetPagesTotal()))
}

// percent returns fraction as "43.1%". It says 100.0% at the very last page
// only: rounding is down.
func percent(p *migratedv1.Progress) string {
	return fmt.Sprintf("%.1f%%", float64(int(fraction(p)*1000))/10)
}

// bytesText returns a number of bytes as "4.0 GiB".
func bytesText(n uint64) string { return units.Bytes(n) }

// rateText returns bytes a second as "812.4 MB/s".
func rateText(perSecond float64) string { return units.Rate(perSecond) }

// durationText returns a duration with the digits that matter, "-" where there is none.
func durationText(d *durationpb.Duration) string {
	if d == nil {
		return "-"
	}
	return units.Duration(d.AsDuration())
}

// timeText returns a time in the operator's time zone.
func timeText(t *timestamppb.Timestamp) string {
	if t == nil {
		return "-"
	}
	return t.AsTime().Local().Format("2006-01-02 15:04:05")
}

// plural returns "1 page", "2 pages".
func plural(n uint64, noun string) string { return units.Plural(n, noun) }

// figures lists what is worth knowing of a running migration, the most
// important first: a narrow terminal shows the first of them.
func figures(p *migratedv1.Progress) []string {
	list := []string{fmt.Sprintf("%d/%d pages", p.GetPagesPresent(), p.GetPagesTotal()), rateText(p.GetBytesPerSecond())}
	if p.GetTimeLeft() != nil {
		list = append(list, durationText(p.GetTimeLeft())+" left")
	}
	if p.GetDowntime() != nil {
		list = append(list, "downtime "+durationText(p.GetDowntime()))
	}
	faults := plural(p.GetFaults(), "fault")
	if p.GetFaultP99() != nil {
		faults += " (p99 " + durationText(p.GetFaultP99()) + ")"
	}
	return append(list, faults)
}

// summary says in a line what a completed migration took.
func summary(m *migratedv1.Migration) string {
	p := m.GetProgress()
	s := "completed: downtime " + durationText(p.GetDowntime())
	if p.GetResidency() != nil {
		s += ", all memory after " + durationText(p.GetResidency())
	}
	s += fmt.Sprintf(", %s (%s on the wire), %s", bytesText(p.GetBytesTotal()), bytesText(p.GetBytesOnWire()), plural(p.GetFaults(), "fault"))
	if p.GetFaults() > 0 && p.GetFaultP99() != nil {
		s += " (p99 " + durationText(p.GetFaultP99()) + ", max " + durationText(p.GetFaultMax()) + ")"
	}
	return s
}

// orText returns s, or what stands in its place.
func orText(s, instead string) string {
	if s == "" {
		return instead
	}
	return s
}
