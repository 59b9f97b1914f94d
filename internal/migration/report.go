// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/migrated-vm/migrated/internal/printable"
	"github.com/migrated-vm/migrated/internal/qmp"
	"github.com/migrated-vm/migrated/pkg/postcopy"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// Bounds for what another daemon says for the report. It is kept as long as the migration is known.
const (
	longestVersion = 100      // bytes
	maxToldBytes   = 64 << 10 // bytes of its counts and timeline
)

// Report returns everything that is known of the migration. The caller owns it.
func (t *Tracker) Report() *migratedv1.Report {
	t.mu.Lock()
	defer t.mu.Unlock()
	r := proto.CloneOf(t.noted)
	r.Time, r.Migration, r.Timeline = timestamppb.Now(), proto.CloneOf(t.view), t.timeline.shown()
	return r
}

// WasOver says whether an earlier run of the daemon saw the end of the migration. The report that it wrote has more
// than this one.
func (t *Tracker) WasOver() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.wasOver
}

// setDeleted records that the migration was deleted.
func (t *Tracker) setDeleted() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.deleted = true
}

// Deleted says whether the migration was deleted. Its report must not be stored any more.
func (t *Tracker) Deleted() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.deleted
}

// note adds to the report what the Migration message has no field for.
func (t *Tracker) note(add func(*migratedv1.Report)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	add(t.noted)
}

// noteTakenUp records that an earlier run of the daemon began the migration. over: that run also saw its end.
func (t *Tracker) noteTakenUp(over bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.noted.TakenUp, t.wasOver = true, over
}

// versionsOf returns the versions that a host reports, bounded and printable. qemu replaces its QEMU version if it is
// not empty.
func versionsOf(said *migratedv1.HostVersions, qemu string) *migratedv1.HostVersions {
	line := func(s string) string {
		s = printable.Line(s)
		return strings.ToValidUTF8(s[:min(len(s), longestVersion)], "")
	}
	if qemu == "" {
		qemu = said.GetQemu()
	}
	return &migratedv1.HostVersions{Daemon: line(said.GetDaemon()), Qemu: line(qemu), Kernel: line(said.GetKernel())}
}

// noteSteps adds the durations of the parts of the downtime that were reached.
func (s *Source) noteSteps(steps *migratedv1.DowntimeSteps) {
	if s.takenUp || s.steps.stop == 0 {
		return
	}
	steps.StopTime = durationpb.New(s.steps.stop)
	if s.steps.save > 0 {
		steps.SaveTime = durationpb.New(s.steps.save)
	}
	if s.loadAnswer != nil {
		steps.TransferTime, steps.LoadTime = durationpb.New(s.steps.transfer), durationpb.New(s.steps.load)
	}
	s.note(func(r *migratedv1.Report) { r.DowntimeSteps = steps })
}

// noteDestinationReport adds what a destination says when the migration is over there.
func (s *Source) noteDestinationReport(answer *migratedv1.WatchIncomingResponse) {
	if !Terminal(answer.GetState()) || proto.Size(answer.GetIncoming())+proto.Size(answer.GetTimeline()) > maxToldBytes {
		return
	}
	s.note(func(r *migratedv1.Report) {
		r.Incoming, r.DestinationTimeline = answer.GetIncoming(), answer.GetTimeline()
	})
}

// noteQEMU adds the version of this host's QEMU.
func (d *Destination) noteQEMU(version qmp.Version) {
	d.note(func(r *migratedv1.Report) { r.Destination.Qemu = version.String() })
}

// noteRun adds what is known when the VM runs: the faults until then, and how long QEMU took to run the VM. took is 0
// if the VM stays paused.
func (d *Destination) noteRun(early postcopy.Stats, took time.Duration) {
	steps := &migratedv1.DowntimeSteps{LoadTime: d.loadTime}
	if took > 0 {
		steps.ContinueTime = durationpb.New(took)
	}
	in := &migratedv1.IncomingPages{EarlyFaults: early.Faults, EarlyFaultMax: durationpb.New(early.FaultMax)}
	d.note(func(r *migratedv1.Report) { r.DowntimeSteps, r.Incoming = steps, in })
}

// Report returns everything that is known of the migration at this host. The caller owns it.
func (d *Destination) Report() *migratedv1.Report {
	r := d.Tracker.Report()
	var all Counts
	d.AddCounts(&all)
	last := d.engines.last()
	if last == nil {
		return r // no engine was made: there is no memory to report
	}
	times := d.Times()
	if r.Incoming == nil {
		r.Incoming = &migratedv1.IncomingPages{}
	}
	in := r.Incoming
	in.TakenUp = r.GetTakenUp()
	in.Causes = &migratedv1.FaultCauses{
		Missing: all.Faults.Missing, Swept: all.Faults.Swept, Ahead: all.Faults.Ahead,
		Waiting: all.Faults.Waiting, Zero: all.Faults.Zero, Present: all.Faults.Present,
	}
	for longest, n := range all.Latency.All() {
		in.Latency = append(in.Latency, &migratedv1.LatencyBucket{Longest: durationpb.New(longest), Count: n})
	}
	in.LatencySum = durationpb.New(all.Latency.Sum)
	in.DemandPages, in.SweepPages = all.DemandPages, all.BulkPages
	in.DemandBytes, in.SweepBytes, in.UnpackedBytes = all.DemandBytes, all.BulkBytes, all.UnpackedBytes
	in.LaneReconnections, in.MostBulkLanes, in.BulkLanesLost = all.LaneReconnections, all.MostBulkLanes, all.BulkLanesLost
	in.Paused, in.LongestPause = durationpb.New(times.totalPause()), durationpb.New(times.LongestPause)
	d.meter.report(last.Stats(), in)
	return r
}
