// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"testing"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/internal/qmp"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// TestGuestGivesMemoryBack: while its memory comes, a guest frees pages and reports them, a balloon takes more, and both are
// used again. Nothing that the guest uses is lost, or is what it was before.
func TestGuestGivesMemoryBack(t *testing.T) {
	g := newGiver(t, lab.VMConfig{MemoryMiB: 512, FreePageReporting: true}, "1M", func(*lab.Host) {}, "migrated.churn=64")
	client, err := qmp.Dial(testContext(t), g.lab.B.Path(lab.EventsPath))
	if err != nil {
		t.Fatal(err)
	}
	for i, mib := range []int{352, 512, 352, 512} {
		if err := client.Do(testContext(t), "balloon", map[string]any{"value": mib << 20}, nil); err != nil {
			t.Fatal(err)
		}
		churned(t, &g.guest, g.began+uint64(i/2)+1)
	}
	if err := client.Disconnect(); err != nil {
		t.Error(err)
	}
	if discarded := g.finish(4); discarded < 64<<20 {
		t.Errorf("the guest gave %d bytes back", discarded)
	}
}

// A giver is a guest that moves, slowly, and gives memory back meanwhile.
type giver struct {
	*testing.T
	lab   *lab.Lab
	guest report.Log
	port  *report.Port
	began uint64 // how often it had given memory back when it was switched over
}

// newGiver boots a guest in a VM like vm, has it at work, and ready, and returns when it runs at the destination with
// little of its memory. The bandwidth is what keeps it there for as long as a test needs.
func newGiver(t *testing.T, vm lab.VMConfig, bandwidth string, ready func(*lab.Host), args ...string) *giver {
	t.Helper()
	l := newHosts(t)
	startDaemon(t, l.A)
	startDaemon(t, l.B)
	vm.VCPUs = 2
	vm = linux(t, vm, append(args, "migrated.mem=96", "migrated.workers=1", "migrated.rate=500")...)
	startVM(t, l.A, vm, lab.EventsArgs()...)
	g := &giver{T: t, lab: l}
	port := openGuest(t, l.A, &g.guest)
	churned(t, &g.guest, 1)
	ready(l.A)
	if err := port.Close(); err != nil {
		t.Fatal(err)
	}
	if out, code := operate(t, l.A, "migrate", "--vm", lab.QMPPath, "--to", l.B.DaemonAddr(), "--id", "m", "--bandwidth", bandwidth, "--detach"); code != 0 {
		t.Fatalf("exit code %d:\n%s", code, out)
	}
	await(t, control(t, l.A), "m", func(m *migratedv1.Migration) bool { return m.GetState() == stateActive })
	g.port = openGuest(t, l.B, &g.guest)
	g.began = churned(t, &g.guest, 0)
	return g
}

// finish lets the rest of the memory come, checks all of it once the guest has given memory back so often since the switch, and
// returns how many bytes it gave back meanwhile.
func (g *giver) finish(times uint64) (discarded uint64) {
	g.Helper()
	if m := get(g.T, g.lab.B, "m"); m.GetState() != stateActive {
		g.Errorf("the migration was %v before the guest had given anything back", m.GetState())
	}
	if out, code := operate(g.T, g.lab.A, "bandwidth", "m", "none"); code != 0 {
		g.Fatalf("exit code %d:\n%s", code, out)
	}
	m := await(g.T, control(g.T, g.lab.B), "m", func(*migratedv1.Migration) bool { return false })
	if m.GetState() != migratedv1.MigrationState_MIGRATION_STATE_COMPLETED {
		g.Fatalf("the migration is %v: %v", m.GetState(), m.GetError())
	}
	churned(g.T, &g.guest, g.began+times)
	verifyLinux(g.T, &g.guest, g.port)
	if err := g.port.Close(); err != nil {
		g.Error(err)
	}
	discarded = m.GetProgress().GetBytesDiscarded()
	g.Logf("the guest gave %d MiB back while %d pages came", discarded>>20, m.GetProgress().GetPagesTotal())
	return discarded
}

// churned waits until the guest has used and freed its memory so often, and returns how often it has.
func churned(t *testing.T, guest *report.Log, times uint64) (n uint64) {
	t.Helper()
	if _, _, err := guest.Wait(testContext(t), guest.Len(), func(l report.Line) bool {
		if l.Window != nil {
			n = l.Window.Churned
		}
		return l.Window != nil && n >= times
	}); err != nil {
		t.Fatalf("the guest has freed its memory %d times, not %d: %v", n, times, err)
	}
	return n
}
