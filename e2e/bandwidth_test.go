// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"testing"
	"time"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/lab"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// flow is what an emulated wire carried in a period, by the wire's own clock.
type flow struct {
	bytes int64
	took  time.Duration
}

func between(from, to lab.Stats) flow { return flow{to.Bytes - from.Bytes, to.At - from.At} }

func (f flow) rate() float64 { return float64(f.bytes) / f.took.Seconds() }

// TestBandwidth checks that the limit applies to the pages that the VM does not wait for, also after the destination's
// daemon was killed and started again. Pages that the VM waits for arrive many times as fast, and so do all pages in a
// migration without a limit.
func TestBandwidth(t *testing.T) {
	const limit = 1 << 19
	l := linkedHosts(t, lab.Link{Rate: 1e9, Delay: 100 * time.Microsecond})
	a := startDaemon(t, l.A)
	startDaemon(t, l.B)
	vm := plainLinux(t, lab.VMConfig{VCPUs: 1, MemoryMiB: 256, Nodes: 1},
		"migrated.pattern=idle", "migrated.mem=64", "migrated.workers=1")
	var guest report.Log
	port := bootLinux(t, l.A, vm, &guest)
	if err := port.Close(); err != nil {
		t.Fatal(err)
	}

	// To host B without a limit.
	spec := &migratedv1.MigrationSpec{Vm: lab.QMPPath, Destination: l.B.DaemonAddr()}
	start(t, control(t, l.A), "free", spec)
	awaitState(t, control(t, l.A), "free", stateActive)
	from := l.AB.Stats()
	completed(t, awaitEnd(t, control(t, l.A), "free"))
	free := between(from, l.AB.Stats())

	// Back to host A with a limit.
	if out, code := operate(
		t, l.B, "migrate", "--vm", lab.QMPPath, "--to", l.A.DaemonAddr(), "--id", "limited",
		"--bandwidth", "512K", "--detach",
	); code != 0 {
		t.Fatalf("exit code %d:\n%s", code, out)
	}
	awaitState(t, control(t, l.B), "limited", stateActive)
	first := swept(t, l.BA, l.A, limit)
	mustKill(t, a)
	startDaemon(t, l.A)
	awaitState(t, control(t, l.A), "limited", stateActive)
	second := swept(t, l.BA, l.A, limit)

	// The guest reads all of its pages.
	port = openGuest(t, l.A, &guest)
	from = l.BA.Stats()
	verified, err := port.Verify(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	demand := between(from, l.BA.Stats())
	if err := guest.Err(); err != nil || verified.Corruptions != 0 || verified.Pages == 0 {
		t.Errorf("the guest checked %d pages and found %d corruptions: %v", verified.Pages, verified.Corruptions, err)
	}
	if err := port.Close(); err != nil {
		t.Error(err)
	}
	if m := get(t, l.B, "limited"); m.GetState() != stateActive {
		t.Errorf("before the limit was lifted the migration was %v", m.GetState())
	}
	if out, code := operate(t, l.B, "bandwidth", "limited", "none"); code != 0 {
		t.Errorf("exit code %d:\n%s", code, out)
	}
	completed(t, awaitEnd(t, control(t, l.B), "limited"))

	t.Logf("bytes a second on the wire, limit %d: swept %.0f and, by a daemon that was started again, %.0f; "+
		"while the guest waits for its pages %.0f; without a limit %.0f",
		limit, first, second, demand.rate(), free.rate())
	for _, rate := range []float64{first, second} {
		if rate > 1.25*limit || rate < 0.6*limit {
			t.Errorf("the sweep takes %.0f bytes a second, the limit is %d", rate, limit)
		}
	}
	if demand.rate() < 3*limit || free.rate() < 10*limit {
		t.Errorf("%.0f bytes a second when the guest waits and %.0f without a limit: is %d the limit of these, too?",
			demand.rate(), free.rate(), limit)
	}
}

// swept returns how many bytes a second the wire carries of pages that the guest does not wait for. It measures for
// some seconds of the wire's clock.
func swept(t *testing.T, wire *lab.Wire, destination *lab.Host, limit uint64) float64 {
	t.Helper()
	const span = 4 * time.Second
	// What a page that the guest waits for takes on this wire besides its data: the frames and headers of gRPC, TCP, IP
	// and Ethernet in the reply. Its request is on the other wire.
	const overhead = 400
	before, from := reportOf(t, destination, "limited"), wire.Stats()
	for wire.Stats().At-from.At < span {
		select {
		case <-time.After(50 * time.Millisecond):
		case <-t.Context().Done():
			t.Fatal(t.Context().Err())
		}
	}
	after, carried := reportOf(t, destination, "limited"), between(from, wire.Stats())
	p := after.GetMigration().GetProgress()
	if p.GetBandwidth() != limit || p.GetPagesPresent() == p.GetPagesTotal() {
		t.Errorf("the limit is shown as %d, with %d of %d pages present",
			p.GetBandwidth(), p.GetPagesPresent(), p.GetPagesTotal())
	}
	faults := p.GetFaults() - before.GetMigration().GetProgress().GetFaults()
	demanded := after.GetIncoming().GetDemandBytes() - before.GetIncoming().GetDemandBytes() + faults*overhead
	t.Logf("in %v the wire carried %d bytes, %d of them for faults; the sweep is shown with %.0f bytes a second",
		carried.took, carried.bytes, demanded, p.GetSweepBytesPerSecond())
	return float64(carried.bytes-int64(demanded)) / carried.took.Seconds()
}
