// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/migrated-vm/migrated/pkg/postcopy"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// TestTimelineIsBounded: after days of a lost network, the timeline has the first states and the last.
func TestTimelineIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tracker := newTracker(&migratedv1.Migration{Id: "m1", State: migratedv1.MigrationState_MIGRATION_STATE_SETUP})
		const (
			paused    = migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_PAUSED
			mending   = migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_RECOVER
			completed = migratedv1.MigrationState_MIGRATION_STATE_COMPLETED
		)
		for i := range 1000 {
			time.Sleep(time.Second)
			state := paused
			if i%2 == 1 {
				state = mending
			}
			tracker.setState(state)
			tracker.setState(state) // not a change
		}
		time.Sleep(time.Second)
		tracker.update(func(m *migratedv1.Migration) {
			m.State, m.Error = completed, &migratedv1.MigrationError{Reason: migratedv1.Reason_REASON_NO_MEMORY}
		})
		line := tracker.Report().GetTimeline()
		changes := line.GetChanges()
		if len(changes) != firstChanges+lastChanges || line.GetLeftOut() != 1002-uint32(len(changes)) ||
			line.GetLeftOutAfter() != firstChanges {
			t.Fatalf("%d changes, %d left out after %d", len(changes), line.GetLeftOut(), line.GetLeftOutAfter())
		}
		for i, c := range changes {
			after := time.Duration(i) * time.Second
			if i >= firstChanges {
				after = time.Duration(1001-len(changes)+1+i) * time.Second
			}
			if c.GetSinceStart().AsDuration() != after {
				t.Errorf("change %d came after %v, want %v", i, c.GetSinceStart().AsDuration(), after)
			}
		}
		last := changes[len(changes)-1]
		if changes[0].GetState() != migratedv1.MigrationState_MIGRATION_STATE_SETUP || last.GetState() != completed ||
			last.GetReason() != migratedv1.Reason_REASON_NO_MEMORY || !last.GetTime().AsTime().Equal(time.Now()) {
			t.Errorf("from %v to %v", changes[0], last)
		}
		if times := tracker.Times(); times.LongestPause != 1000*time.Second || times.totalPause() != 1000*time.Second {
			t.Errorf("it waited for %v, for %v at the longest", times.totalPause(), times.LongestPause)
		}
	})
}

// TestReportIsTheCallersOwn: a caller's change of a report does not affect the migration, and vice versa.
func TestReportIsTheCallersOwn(t *testing.T) {
	tracker := newTracker(&migratedv1.Migration{Id: "m1"})
	tracker.note(func(r *migratedv1.Report) {
		r.DowntimeSteps = &migratedv1.DowntimeSteps{StopTime: durationpb.New(1)}
	})
	r := tracker.Report()
	r.Migration.Id, r.DowntimeSteps.StopTime.Nanos = "x", 2
	r.Timeline.Changes[0].State = migratedv1.MigrationState_MIGRATION_STATE_ENDED
	again := tracker.Report()
	if again.GetMigration().GetId() != "m1" || again.GetDowntimeSteps().GetStopTime().GetNanos() != 1 ||
		again.GetTimeline().GetChanges()[0].GetState() == migratedv1.MigrationState_MIGRATION_STATE_ENDED {
		t.Errorf("%v", again)
	}
}

// TestCurve: the curve spans from the switch to the last page. The number of its points is bounded, and they rise.
// The best rate is that of the best second.
func TestCurve(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m meter
		began := time.Now()
		m.switched(began, time.Millisecond)
		const ticks = 10_000
		at := func(i int) postcopy.Stats {
			bytes := uint64(i) * 1000
			if i > ticks/2 {
				bytes += uint64(i-ticks/2) * 3000 // faster from then on
			}
			return postcopy.Stats{PagesTotal: ticks, PagesPresent: uint64(i), BytesReceived: bytes, Faults: uint64(i)}
		}
		for i := range ticks {
			m.progress(at(i))
			time.Sleep(progressInterval)
		}
		end := at(ticks)
		end.LastPage = time.Now()
		var in migratedv1.IncomingPages
		m.report(end, &in)
		points := in.GetSamples()
		if n := len(points); n < curvePoints/2 || n > curvePoints+1 {
			t.Fatalf("there are %d points", n)
		}
		for i, p := range points[1:] {
			if p.GetSinceSwitch().AsDuration() <= points[i].GetSinceSwitch().AsDuration() ||
				p.GetPagesPresent() <= points[i].GetPagesPresent() {
				t.Errorf("from %v to %v", points[i], p)
			}
		}
		first, last := points[0], points[len(points)-1]
		if first.GetSinceSwitch().AsDuration() != 0 || last.GetSinceSwitch().AsDuration() != ticks*progressInterval ||
			last.GetBytesOnWire() != end.BytesReceived || last.GetFaults() != ticks {
			t.Errorf("from %v to %v", first, last)
		}
		if got := in.GetBestBytesPerSecond(); got != 40_000 {
			t.Errorf("the best rate is %v", got)
		}
	})
}

// TestVersionsOfOthers: versions that another daemon reports are bounded and valid text.
func TestVersionsOfOthers(t *testing.T) {
	long := make([]rune, 1000)
	for i := range long {
		long[i] = 'ö'
	}
	v := versionsOf(&migratedv1.HostVersions{Daemon: "x" + string(long), Qemu: "lies", Kernel: "6\x1b[2J"}, "7.2.22")
	if len(v.GetDaemon()) > longestVersion || v.GetQemu() != "7.2.22" || v.GetKernel() != `6\x1b[2J` {
		t.Errorf("%v", v)
	}
	if _, err := proto.Marshal(v); err != nil { // it fails for invalid UTF-8
		t.Error(err)
	}
}
