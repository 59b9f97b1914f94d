// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/lab"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// travellerLink is a network on which a traveller's memory takes some seconds, so that there is a middle of its migrations.
var travellerLink = lab.Link{Rate: 400e6, Delay: 100 * time.Microsecond}

// A traveller is a VM with a busy Linux guest that goes from host to host, and finds each time that its memory is whole.
type traveller struct {
	*testing.T
	lab   *lab.Lab
	at    *lab.Host
	moves int
}

// newTraveller boots one on host A.
func newTraveller(t *testing.T, l *lab.Lab) *traveller {
	t.Helper()
	vm := linux(t, lab.VMConfig{VCPUs: 2, MemoryMiB: 256, Nodes: 1}, "migrated.mem=128", "migrated.workers=2", "migrated.rate=500", "migrated.window=100ms")
	startVM(t, l.A, vm)
	v := &traveller{T: t, lab: l, at: l.A}
	var guest report.Log
	port := openGuest(t, l.A, &guest)
	if _, err := guest.WaitReady(testContext(t)); err != nil {
		t.Fatal(err)
	}
	awaitWindows(t, &guest, 3)
	if err := port.Close(); err != nil {
		t.Fatal(err)
	}
	return v
}

func (v *traveller) other() *lab.Host {
	if v.at == v.lab.A {
		return v.lab.B
	}
	return v.lab.A
}

// move migrates it to the other host. In the middle of that, when it runs there and most of its memory is here,
// it calls meanwhile, with the migration's id. It returns the longest time for which the guest did nothing.
func (v *traveller) move(meanwhile func(id string)) (stall time.Duration) {
	v.Helper()
	v.moves++
	id, from, to := fmt.Sprintf("move-%d", v.moves), v.at, v.other()
	said := lines(v.T, to)
	client := control(v.T, from)
	spec := &migratedv1.MigrationSpec{Vm: lab.QMPPath, Destination: to.DaemonAddr()}
	if _, err := client.Start(testContext(v.T), &migratedv1.StartRequest{Id: id, Spec: spec}); err != nil {
		v.Fatal(err)
	}
	m := await(v.T, client, id, func(m *migratedv1.Migration) bool { return m.GetState() == stateActive })
	if m.GetState() != stateActive {
		v.Fatalf("there was no middle of migration %s: %v", id, m)
	}
	meanwhile(id)
	if m = await(v.T, control(v.T, from), id, func(*migratedv1.Migration) bool { return false }); m.GetState() != migratedv1.MigrationState_MIGRATION_STATE_COMPLETED {
		v.Fatalf("migration %s is %v: %v", id, m.GetState(), m.GetError())
	}
	v.at = to
	var guest report.Log
	port := openGuest(v.T, to, &guest)
	defer port.Close()
	awaitWindows(v.T, &guest, 3)
	verified, err := port.Verify(testContext(v.T))
	if err != nil {
		v.Fatal(err)
	}
	if verified.Corruptions != 0 || verified.Pages == 0 || guest.Err() != nil {
		v.Errorf("after migration %s the guest finds %d corruptions: %v", id, verified.Corruptions, guest.Err())
	}
	nothingKept(v.T, v.lab.A, v.lab.B)
	return longestStall(v.T, to, said)
}

// inFlight checks that pages are missing yet: what happened until now happened in the middle.
func (v *traveller) inFlight(id string, to *lab.Host) {
	v.Helper()
	answer, err := control(v.T, to).Get(testContext(v.T), &migratedv1.GetRequest{Id: id})
	if err != nil {
		v.Fatal(err)
	}
	if p := answer.GetMigration().GetProgress(); p.GetPagesPresent() == p.GetPagesTotal() {
		v.Errorf("migration %s was over before it was disturbed: %v", id, answer)
	}
}

// lines are how many the guest has written on a host.
func lines(t *testing.T, h *lab.Host) int {
	t.Helper()
	text, err := os.ReadFile(h.Path(lab.SerialLog))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return strings.Count(string(text), "\n")
}

// longestStall is the longest that one of the guest's operations took, by its own clock, in what it has written on
// that host after so many lines.
func longestStall(t *testing.T, h *lab.Host, after int) time.Duration {
	t.Helper()
	text, err := os.ReadFile(h.Path(lab.SerialLog))
	if err != nil {
		t.Fatal(err)
	}
	longest, windows := int64(0), 0
	for i, line := range strings.Split(string(text), "\n") {
		if parsed, err := report.Parse([]byte(line)); i >= after && err == nil && parsed.Window != nil {
			longest = max(longest, parsed.Window.MaxUS)
			windows++
		}
	}
	if windows == 0 {
		t.Errorf("the guest reported nothing on host %s", h.Name)
	}
	return time.Duration(longest) * time.Microsecond
}
