// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"text/tabwriter"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// rehearsalSummary says in a line what a migration would take.
func rehearsalSummary(m *migratedv1.Migration) string {
	r := m.GetRehearsal()
	s := fmt.Sprintf("rehearsed: the VM would stand still for %s (stop %s, save %s, load %s, continue %s), "+
		"%s of device state, %s of memory would follow",
		durationText(r.GetDowntime()), durationText(r.GetStopTime()), durationText(r.GetSaveTime()),
		durationText(r.GetTransferTime()), durationText(r.GetContinueTime()), bytesText(r.GetBytesDeviceState()), bytesText(r.GetBytesMemory()))
	if n := len(r.GetDifferences()); n > 0 {
		s += fmt.Sprintf("; the state of %s is another when the destination saves it again", plural(uint64(n), "device"))
	}
	return s
}

// printRehearsal prints what a rehearsal found, a fact a line.
func printRehearsal(out io.Writer, r *migratedv1.Rehearsal) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "It would stand still\t%s: stop %s, save %s, load %s (%s, begun while it is saved), "+
		"hand over, continue %s\n",
		durationText(r.GetDowntime()), durationText(r.GetStopTime()), durationText(r.GetSaveTime()),
		durationText(r.GetTransferTime()), durationText(r.GetLoadTime()), durationText(r.GetContinueTime()))
	fmt.Fprintf(w, "Device state\t%s\n", bytesText(r.GetBytesDeviceState()))
	fmt.Fprintf(w, "Memory to follow\t%s\n", bytesText(r.GetBytesMemory()))
	if len(r.GetDifferences()) == 0 {
		fmt.Fprintln(w, "Saved again there\tthe same, byte for byte")
	}
	for _, d := range r.GetDifferences() {
		fmt.Fprintf(w, "Another there\t%s, instance %d: %s\n", d.GetDevice(), d.GetInstance(), plural(d.GetBytes(), "byte"))
	}
	return w.Flush()
}
