// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"cmp"
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/lab"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// travellerLink is a network on which a traveller's memory takes some seconds, so that a test can act in the middle of
// a migration.
var travellerLink = lab.Link{Rate: 400e6, Delay: 100 * time.Microsecond}

// travellerWindow is the interval of a traveller's reports.
const travellerWindow = 50 * time.Millisecond

// traveller is a VM with a busy Linux guest that moves from host to host. After each move, the guest checks its memory
// and its disk.
type traveller struct {
	*testing.T
	lab   *lab.Lab
	at    *lab.Host
	moves int
}

// newTraveller boots a traveller on host A.
func newTraveller(t *testing.T, l *lab.Lab) *traveller {
	t.Helper()
	vm := linux(t, lab.VMConfig{VCPUs: 2, MemoryMiB: 256, Nodes: 1}, "migrated.mem=128", "migrated.workers=2",
		"migrated.rate=500", "migrated.window="+travellerWindow.String())
	var guest report.Log
	port := bootLinux(t, l.A, vm, &guest)
	v := &traveller{T: t, lab: l, at: l.A}
	awaitWindows(t, &guest, 3)
	if err := port.Close(); err != nil {
		t.Fatal(err)
	}
	return v
}

// move migrates the traveller to the other host. It calls meanwhile with the migration's ID when the VM runs there and
// most of its memory is still at the source. It returns the longest time for which the guest did nothing.
func (v *traveller) move(meanwhile func(id string)) (stall time.Duration) {
	v.Helper()
	v.moves++
	id, from, to := fmt.Sprintf("move-%d", v.moves), v.at, v.lab.Other(v.at)
	said := v.reported()
	client := control(v.T, from)
	// The limit is for a busy machine, on which meanwhile may take longer than all of the memory.
	spec := &migratedv1.MigrationSpec{Vm: lab.QMPPath, Destination: to.DaemonAddr(), Bandwidth: 8 << 20}
	start(v.T, client, id, spec)
	awaitState(v.T, client, id, stateActive)
	meanwhile(id)
	unlimit(v.T, control(v.T, to), id)
	completed(v.T, awaitEnd(v.T, control(v.T, from), id))
	v.at = to
	var guest report.Log
	port := openGuest(v.T, to, &guest)
	defer port.Close()
	awaitWindows(v.T, &guest, 3)
	verifyLinux(v.T, &guest, port)
	onlyWordKept(v.T, v.lab.A, v.lab.B)
	return v.longestStall(said)
}

// written returns the windows that the guest reported on a host.
func (v *traveller) written(h *lab.Host) (all []*report.Window) {
	v.Helper()
	text, err := os.ReadFile(h.Path(lab.SerialLog))
	if err != nil && !os.IsNotExist(err) {
		v.Fatal(err)
	}
	for line := range bytes.Lines(text) {
		if l, err := report.Parse(line); err == nil && l.Window != nil { // the switch may cut a line in two
			all = append(all, l.Window)
		}
	}
	return all
}

// reported returns the number of the last window that the guest has reported.
func (v *traveller) reported() (last uint64) {
	v.Helper()
	for _, w := range slices.Concat(v.written(v.lab.A), v.written(v.lab.B)) {
		last = max(last, w.Seq)
	}
	return last
}

// longestStall returns the longest time for which the guest did nothing after a window, by its own clock: its slowest
// operation, or the longest delay of a report.
func (v *traveller) longestStall(since uint64) (longest time.Duration) {
	v.Helper()
	all := slices.Concat(v.written(v.lab.A), v.written(v.lab.B))
	slices.SortFunc(all, func(a, b *report.Window) int { return cmp.Compare(a.Seq, b.Seq) })
	for i, w := range all {
		if i > 0 && w.Seq > since {
			longest = max(longest, time.Duration(w.MaxUS)*time.Microsecond, report.Late(all[i-1], w, travellerWindow))
		}
	}
	return longest
}
