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

// What another daemon says for the report is kept as long as the migration is known, and so it is bounded.
const (
	longestVersion = 100      // bytes
	mostTold       = 64 << 10 // bytes of its counts and states
)

// Report is all that is known of the migration. The caller owns it.
func (t *Tracker) Report() *migratedv1.Report {
	t.mu.Lock()
	defer t.mu.Unlock()
	r := proto.CloneOf(t.noted)
	r.Time, r.Migration, r.Timeline = timestamppb.Now(), proto.CloneOf(t.view), t.timeline.shown()
	return r
}

// WasOver says that an earlier run of the daemon saw the end of the migration: what it has written down of it is more.
func (t *Tracker) WasOver() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.wasOver
}

// note adds to the report what the Migration has no place for.
func (t *Tracker) note(add func(*migratedv1.Report)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	add(t.noted)
}

// noteTakenUp is for a migration that an earlier run of the daemon began, and whose end it saw where over is set.
func (t *Tracker) noteTakenUp(over bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.noted.TakenUp, t.wasOver = true, over
}

// versionsOf is what a host says that runs there, with QEMU's version where that is known from elsewhere.
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

// noteSteps adds what the parts of the downtime took, as far as they came.
func (s *Source) noteSteps(steps *migratedv1.DowntimeSteps) {
	if s.takenUp || s.steps.stop == 0 {
		return
	}
	steps.StopTime = durationpb.New(s.steps.stop)
	if s.steps.save > 0 {
		steps.SaveTime = durationpb.New(s.steps.save)
	}
	if s.loaded != nil {
		steps.TransferTime, steps.LoadTime = durationpb.New(s.steps.transfer), durationpb.New(s.steps.load)
	}
	s.note(func(r *migratedv1.Report) { r.DowntimeSteps = steps })
}

// noteTold adds what a destination says when the migration is over there.
func (s *Source) noteTold(answer *migratedv1.WatchIncomingResponse) {
	if !Terminal(answer.GetState()) || proto.Size(answer.GetIncoming())+proto.Size(answer.GetTimeline()) > mostTold {
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

// noteRun adds what is known when the VM runs: what pages were waited for up to then, and how long QEMU took after it
// was told. A VM that stays paused was not told.
func (d *Destination) noteRun(early postcopy.Stats, took time.Duration) {
	steps := &migratedv1.DowntimeSteps{LoadTime: d.loadTime}
	if took > 0 {
		steps.ContinueTime = durationpb.New(took)
	}
	in := &migratedv1.IncomingPages{EarlyFaults: early.Faults, EarlyFaultMax: durationpb.New(early.FaultMax)}
	d.note(func(r *migratedv1.Report) { r.DowntimeSteps, r.Incoming = steps, in })
}

// Report is all that is known of the migration here. The caller owns it.
func (d *Destination) Report() *migratedv1.Report {
	r := d.Tracker.Report()
	var all Counts
	d.AddCounts(&all)
	last := d.counted.last()
	if last == nil {
		return r // it came to no memory
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
	in.LaneReconnections = all.LaneReconnections
	in.Paused, in.LongestPause = durationpb.New(times.waited()), durationpb.New(times.LongestPause)
	d.meter.report(last.Stats(), in)
	return r
}
