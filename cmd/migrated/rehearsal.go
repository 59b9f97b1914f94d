// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// rehearsalSummary returns a line with what the migration would take.
func rehearsalSummary(m *migratedv1.Migration) string {
	r := m.GetRehearsal()
	s := fmt.Sprintf("rehearsed: the VM would stand still for %s (stop %s, save %s, load %s, continue %s), "+
		"%s of device state, %s of memory would follow",
		durationText(r.GetDowntime()), durationText(r.GetStopTime()), durationText(r.GetSaveTime()),
		durationText(r.GetTransferTime()), durationText(r.GetContinueTime()),
		bytesText(r.GetBytesDeviceState()), bytesText(r.GetBytesMemory()))
	if n := len(r.GetDifferences()); n > 0 {
		s += fmt.Sprintf("; the state of %s differs when the destination saves it again", plural(uint64(n), "device"))
	}
	return s
}

// printRehearsal prints the results of a rehearsal, one on each line.
func printRehearsal(out io.Writer, r *migratedv1.Rehearsal) error {
	return printFacts(out, rehearsalFacts(r))
}

func rehearsalFacts(r *migratedv1.Rehearsal) (facts []fact) {
	add := func(name, format string, args ...any) {
		facts = append(facts, fact{name, fmt.Sprintf(format, args...)})
	}
	add("It would stand still", "%s: stop %s, save %s, load %s (%s, begun while it is saved), hand over, continue %s",
		durationText(r.GetDowntime()), durationText(r.GetStopTime()), durationText(r.GetSaveTime()),
		durationText(r.GetTransferTime()), durationText(r.GetLoadTime()), durationText(r.GetContinueTime()))
	add("Device state", "%s", bytesText(r.GetBytesDeviceState()))
	add("Memory to follow", "%s", bytesText(r.GetBytesMemory()))
	if len(r.GetDifferences()) == 0 {
		add("Saved again there", "the same, byte for byte")
	}
	for _, d := range r.GetDifferences() {
		add("Differs there", "%s, instance %d: %s", d.GetDevice(), d.GetInstance(), plural(d.GetBytes(), "byte"))
	}
	return facts
}
