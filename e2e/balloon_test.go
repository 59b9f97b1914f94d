// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"testing"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/lab"
)

// TestGuestGivesMemoryBack: a guest frees pages and reports them while its memory arrives, and a balloon takes more.
// The guest uses all of these pages again. Nothing that it uses is lost, and no page has its old content.
func TestGuestGivesMemoryBack(t *testing.T) {
	vm := lab.VMConfig{MemoryMiB: 512, FreePageReporting: true}
	g := newShrinkingGuest(t, vm, "1M", func(*lab.Host) {}, "migrated.churn=64")
	size := awaitBalloon(t, g.lab.B, func(uint64) bool { return true })
	for i, mib := range []uint64{352, 512, 352, 512} {
		ask(t, g.lab.B, "balloon", map[string]any{"value": mib << 20}, nil)
		before, shrinks := size, mib<<20 < size
		size = awaitBalloon(t, g.lab.B, func(now uint64) bool { return now != before && now < before == shrinks })
		awaitChurned(t, &g.guest, g.began+uint64(i/2)+1)
	}
	if discarded := g.finish(4); discarded < 64<<20 {
		t.Errorf("the guest gave %d bytes back", discarded)
	}
}

// awaitBalloon waits until ok accepts how many bytes the balloon leaves to the guest, and returns that size.
func awaitBalloon(t *testing.T, h *lab.Host, ok func(size uint64) bool) uint64 {
	t.Helper()
	var balloon struct {
		Actual uint64 `json:"actual"`
	}
	eventually(t, func() error {
		if ask(t, h, "query-balloon", nil, &balloon); !ok(balloon.Actual) {
			return fmt.Errorf("the balloon leaves %d bytes to the guest", balloon.Actual)
		}
		return nil
	})
	return balloon.Actual
}

// shrinkingGuest is a guest that gives memory back during a slow migration.
type shrinkingGuest struct {
	*testing.T
	lab   *lab.Lab
	guest report.Log
	port  *report.Port
	began uint64 // how often it had given memory back at the switch
}

// newShrinkingGuest boots a guest in a VM like vm. It starts to move the VM when the guest works and ready has
// returned. It returns when the VM runs at the destination with little of its memory. The bandwidth keeps most of the
// memory at the source until finish.
func newShrinkingGuest(
	t *testing.T, vm lab.VMConfig, bandwidth string, ready func(*lab.Host), args ...string,
) *shrinkingGuest {
	t.Helper()
	l := newLab(t)
	vm.VCPUs = 2
	vm = linux(t, vm, append(args, "migrated.mem=96", "migrated.workers=1", "migrated.rate=500")...)
	g := &shrinkingGuest{T: t, lab: l}
	port := bootLinux(t, l.A, vm, &g.guest, lab.EventsArgs()...)
	awaitChurned(t, &g.guest, 1)
	ready(l.A)
	if err := port.Close(); err != nil {
		t.Fatal(err)
	}
	if out, code := operate(
		t, l.A, "migrate", "--vm", lab.QMPPath, "--to", l.B.DaemonAddr(), "--id", "m", "--bandwidth", bandwidth, "--detach",
	); code != 0 {
		t.Fatalf("exit code %d:\n%s", code, out)
	}
	awaitState(t, control(t, l.A), "m", stateActive)
	g.port = openGuest(t, l.B, &g.guest)
	g.began = awaitChurned(t, &g.guest, 0)
	return g
}

// finish lifts the bandwidth limit and waits until all memory has arrived. The guest checks its memory after it has
// given memory back this many times since the switch. finish returns how many bytes it gave back during the migration.
func (g *shrinkingGuest) finish(times uint64) (discarded uint64) {
	g.Helper()
	if m := get(g.T, g.lab.B, "m"); m.GetState() != stateActive {
		g.Errorf("the migration was %v before the guest had given anything back", m.GetState())
	}
	if out, code := operate(g.T, g.lab.A, "bandwidth", "m", "none"); code != 0 {
		g.Fatalf("exit code %d:\n%s", code, out)
	}
	m := completed(g.T, awaitEnd(g.T, control(g.T, g.lab.B), "m"))
	awaitChurned(g.T, &g.guest, g.began+times)
	verifyLinux(g.T, &g.guest, g.port)
	if err := g.port.Close(); err != nil {
		g.Error(err)
	}
	discarded = m.GetProgress().GetBytesDiscarded()
	g.Logf("the guest gave %d MiB back while %d pages came", discarded>>20, m.GetProgress().GetPagesTotal())
	return discarded
}

// awaitChurned waits for a report in which the guest has used and freed its memory at least this many times. It returns
// the number in the report.
func awaitChurned(t *testing.T, guest *report.Log, times uint64) (n uint64) {
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
