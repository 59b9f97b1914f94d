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

// locationName returns a location: "destination", or "-" if the daemon does not say.
func locationName(l migratedv1.Location) string {
	if l == migratedv1.Location_LOCATION_UNSPECIFIED {
		return "-"
	}
	return migration.Name(l, "LOCATION_")
}

// reasonName returns a reason: "guest-shutdown".
func reasonName(r migratedv1.Reason) string { return migration.Name(r, "REASON_") }

// stateMeaning says what the state of a migration means for the VM.
func stateMeaning(m *migratedv1.Migration) string { return migration.Meaning(m) }

// supervisionText returns how the destination's userfaultfd is supervised, with
// its label: "labelled system_u:object_r:…"; empty: there is no userfaultfd yet.
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

// earlyLoadText returns how the devices' state was loaded early, or why not; empty: that is not decided yet.
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

// vmName returns the VM's name, or else its QMP socket.
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

// percent returns fraction as "43.1%". It rounds down, so that 100.0% means all
// pages.
func percent(p *migratedv1.Progress) string {
	return fmt.Sprintf("%.1f%%", float64(int(fraction(p)*1000))/10)
}

// bytesText returns a number of bytes as "4.0 GiB".
func bytesText(n uint64) string { return units.Bytes(n) }

// rateText returns bytes a second as "812.4 MB/s".
func rateText(perSecond float64) string { return units.Rate(perSecond) }

// durationText returns a duration with few digits; "-": there is none.
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

// figures returns the figures of a migration that is under way, the most
// important first, because a narrow terminal shows only the first ones.
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

// summary returns a line with the figures of a completed migration.
func summary(m *migratedv1.Migration) string {
	p := m.GetProgress()
	s := "completed: downtime " + durationText(p.GetDowntime())
	if p.GetResidency() != nil {
		s += ", all memory after " + durationText(p.GetResidency())
	}
	s += fmt.Sprintf(", %s (%s on the wire), %s",
		bytesText(p.GetBytesTotal()), bytesText(p.GetBytesOnWire()), plural(p.GetFaults(), "fault"))
	if p.GetFaults() > 0 && p.GetFaultP99() != nil {
		s += " (p99 " + durationText(p.GetFaultP99()) + ", max " + durationText(p.GetFaultMax()) + ")"
	}
	return s + prefixed("; the domain's definition ", m.GetDefinition())
}

// prefixed returns s with a prefix, or nothing if s is empty.
func prefixed(prefix, s string) string {
	if s == "" {
		return ""
	}
	return prefix + s
}

// orText returns s, or instead if s is empty.
func orText(s, instead string) string {
	if s == "" {
		return instead
	}
	return s
}
