// SPDX-License-Identifier: Apache-2.0

package report

import (
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

const ms = time.Millisecond

func took(d time.Duration) *durationpb.Duration { return durationpb.New(d) }

// plain returns the report of a migration to which only the rules about downtime and the longest stall apply.
func plain() *migratedv1.Report {
	return &migratedv1.Report{
		Migration: &migratedv1.Migration{
			Progress: &migratedv1.Progress{
				Downtime: took(10 * ms), Residency: took(10 * time.Second), BytesOnWire: 700e6, BytesDeviceState: 2048,
				Faults: 1000, FaultP99: took(2 * ms), FaultMax: took(8 * ms), PagesGuessed: 300, GuessHits: 0.5,
			},
			EarlyLoad: &migratedv1.EarlyLoad{Loaded: true, Pause: took(4 * ms)},
		},
		DowntimeSteps: &migratedv1.DowntimeSteps{
			SaveTime: took(6 * ms), TransferTime: took(2 * ms), LoadTime: took(ms),
			CommitTime: took(ms), CrossingTime: took(0), ContinueTime: took(ms),
		},
		Incoming: &migratedv1.IncomingPages{
			Causes:     &migratedv1.FaultCauses{Missing: 300, Ahead: 700},
			SweepBytes: 600e6, BestBytesPerSecond: 100e6, EarlyFaultMax: took(ms),
		},
		Source:      &migratedv1.HostVersions{Daemon: "1", Qemu: "7.2.22"},
		Destination: &migratedv1.HostVersions{Daemon: "1", Qemu: "7.2.22"},
	}
}

// TestFindings: each rule applies to the right reports, and its text has the right numbers.
func TestFindings(t *testing.T) {
	for _, c := range []struct {
		name   string
		rule   string
		change func(r *migratedv1.Report)
		want   []string // of its text; none: the rule says nothing
	}{
		{"within its limit", "overdue", func(*migratedv1.Report) {}, nil},
		{"overdue", "overdue", func(r *migratedv1.Report) {
			m := r.GetMigration()
			m.Overdue, m.Spec = true, &migratedv1.MigrationSpec{TotalLimit: took(5 * time.Second)}
			m.StartTime, m.EndTime = timestamppb.New(time.Unix(100, 0)), timestamppb.New(time.Unix(112, 0))
		}, []string{"total_limit of 5.0 s", "took 12.0 s"}},
		{"saving", "downtime-step", func(*migratedv1.Report) {},
			[]string{"10.0 ms", "most of it, 6.0 ms or 60 %", `"save"`}},
		{"nothing is most", "downtime-step", func(r *migratedv1.Report) {
			r.DowntimeSteps.SaveTime, r.DowntimeSteps.ContinueTime = took(3*ms), took(4*ms)
		}, []string{"its longest step, 4.0 ms or 40 %", `"continue"`}},
		{"loading", "downtime-step", func(r *migratedv1.Report) {
			s := r.GetDowntimeSteps()
			s.SaveTime, s.TransferTime, s.LoadTime = took(ms), took(7*ms), took(6*ms)
		}, []string{`"transfer"`, "Loading took 6.0 ms of 2.0 KiB"}},
		{"of a destination", "downtime-step", func(r *migratedv1.Report) { r.DowntimeSteps.SaveTime = nil }, nil},
		{"not switched", "downtime-step", func(r *migratedv1.Report) { r.Migration.Progress.Downtime = nil }, nil},

		{"loaded early", "no-early-load", func(*migratedv1.Report) {}, nil},
		{"not loaded early", "no-early-load", func(r *migratedv1.Report) {
			r.Migration.EarlyLoad = &migratedv1.EarlyLoad{Reason: "it was switched off"}
		}, []string{"2.0 KiB", "10.0 ms", "it was switched off"}},

		{"the switch", "longest-stall", func(*migratedv1.Report) {}, []string{"the switch itself: 10.0 ms", "8.0 ms"}},
		{"the early load", "longest-stall", func(r *migratedv1.Report) { r.Migration.EarlyLoad.Pause = took(30 * ms) },
			[]string{"early load", "30.0 ms", "10.0 ms"}},
		{"a fault", "longest-stall", func(r *migratedv1.Report) { r.Migration.Progress.FaultMax = took(15 * ms) },
			[]string{"a fault of 15.0 ms", "99 % took at most 2.0 ms"}},
		{"one of its kind", "longest-stall", func(r *migratedv1.Report) {
			r.Migration.Progress.FaultMax = took(40 * ms)
		}, []string{"a fault of 40.0 ms", "Only a few faults"}},
		{"loading waited", "longest-stall", func(r *migratedv1.Report) {
			r.Migration.Progress.FaultMax, r.Incoming.EarlyFaultMax = took(40*ms), took(40*ms)
		}, []string{"a fault of 40.0 ms, before QEMU said that the VM runs"}},
		{"a lost network", "longest-stall", func(r *migratedv1.Report) {
			r.Migration.Progress.FaultMax, r.Incoming.LongestPause = took(2100*ms), took(2*time.Second)
		}, []string{"a lost connection: no memory came for 2.0 s", "2.1 s"}},
		{"a lost network is not all", "longest-stall", func(r *migratedv1.Report) {
			r.Migration.Progress.FaultMax, r.Incoming.LongestPause = took(2*time.Second), took(20*ms)
		}, []string{"a fault of 2.0 s", "Only a few faults"}},
		{"no stall", "longest-stall", func(r *migratedv1.Report) {
			r.Migration, r.Incoming = &migratedv1.Migration{}, nil
		}, nil},

		{"no reconnection", "reconnects", func(*migratedv1.Report) {}, nil},
		{"reconnections", "reconnects", func(r *migratedv1.Report) {
			in := r.GetIncoming()
			in.LaneReconnections, in.Paused, in.LongestPause = 3, took(5*time.Second), took(4*time.Second)
		}, []string{"3 times", "5.0 s in all", "4.0 s at the longest"}},

		{"no limit", "bandwidth-limit", func(*migratedv1.Report) {}, nil},
		{"a limit", "bandwidth-limit", func(r *migratedv1.Report) {
			r.Migration.Progress.Bandwidth = 62e6
		}, []string{"at 60.0 MB/s, of 62.0 MB/s", "10.0 s"}},
		{"a limit out of reach", "bandwidth-limit", func(r *migratedv1.Report) {
			r.Migration.Progress.Bandwidth = 1e9
		}, nil},

		{"not the path", "path-limit", func(*migratedv1.Report) {}, nil},
		{"the path", "path-limit", func(r *migratedv1.Report) {
			r.Migration.Progress.BytesOnWire = 950e6
		}, []string{"at 95.0 MB/s for 10.0 s, and at 100.0 MB/s"}},
		{"the path, with a pause", "path-limit", func(r *migratedv1.Report) {
			r.Incoming.Paused = took(3 * time.Second)
		}, []string{"at 100.0 MB/s for 7.0 s"}},
		{"too short", "path-limit", func(r *migratedv1.Report) {
			r.Migration.Progress.Residency = took(999 * ms)
		}, nil},
		{"not over", "path-limit", func(r *migratedv1.Report) { r.Migration.Progress.Residency = nil }, nil},
		{"the limit, not the path", "path-limit", func(r *migratedv1.Report) {
			r.Incoming.BestBytesPerSecond, r.Migration.Progress.Bandwidth = 70e6, 62e6
		}, nil},

		{"busy enough", "path-idle", func(*migratedv1.Report) {}, nil},
		{"idle", "path-idle", func(r *migratedv1.Report) {
			r.Migration.Progress.BytesOnWire = 200e6
		}, []string{"20.0 MB/s on average for 10.0 s, and at 100.0 MB/s"}},
		{"counted in part", "path-idle", func(r *migratedv1.Report) {
			r.Migration.Progress.BytesOnWire, r.Incoming.TakenUp = 200e6, true
		}, nil},

		{"foretold", "fault-causes", func(*migratedv1.Report) {}, nil},
		{"not foretold", "fault-causes", func(r *migratedv1.Report) {
			r.Incoming.Causes.Swept = 400
		}, []string{"70 % of 1000 faults", "300 pages", "50 %"}},
		{"few", "fault-causes", func(r *migratedv1.Report) {
			r.Migration.Progress.Faults, r.Incoming.Causes = 99, &migratedv1.FaultCauses{Missing: 99}
		}, nil},

		{"unexplained", "unexplained-pages", func(r *migratedv1.Report) {
			r.Migration.Progress.PagesUnexplained = 2
		}, []string{"2 pages", "Do not trust"}},
		{"lost", "lost-pages", func(r *migratedv1.Report) {
			r.Migration.Progress.PagesLost = 3
		}, []string{"3 pages", "machine check"}},
		{"touched", "touched-pages", func(r *migratedv1.Report) {
			r.Migration.Progress.PagesTouched = 1
		}, []string{"1 page"}},
		{"daemons", "versions", func(r *migratedv1.Report) {
			r.Destination.Daemon = "2"
		}, []string{"daemon 1 at the source, 2 at the destination"}},
		{"QEMUs", "versions", func(r *migratedv1.Report) {
			r.Destination.Qemu = "10.0.2"
		}, []string{"QEMU 7.2.22 at the source, 10.0.2"}},
		{"unknown", "versions", func(r *migratedv1.Report) { r.Destination = nil }, nil},
		{"taken up", "taken-up", func(r *migratedv1.Report) { r.TakenUp = true }, []string{"last run alone"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := plain()
			c.change(r)
			text := ""
			for _, f := range Findings(r) {
				if f.GetRule() == c.rule {
					text = f.GetText()
				}
			}
			if (text != "") != (len(c.want) > 0) {
				t.Errorf("%s says %q", c.rule, text)
			}
			for _, part := range c.want {
				if !strings.Contains(text, part) {
					t.Errorf("%s says %q, without %q", c.rule, text, part)
				}
			}
		})
	}
	if found := Findings(plain()); len(found) != 2 {
		t.Errorf("of a plain migration there is %v", found)
	}
}

// TestFindingsAreDocumented: docs/report.md lists the names of all rules, which programs use.
func TestFindingsAreDocumented(t *testing.T) {
	text, err := os.ReadFile("../../docs/report.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, rule := range rules {
		if !strings.Contains(string(text), "| `"+rule.name+"` |") {
			t.Errorf("docs/report.md does not list %s", rule.name)
		}
	}
}

func TestPercentile(t *testing.T) {
	latency := []*migratedv1.LatencyBucket{
		{Longest: took(ms), Count: 50},
		{Longest: took(2 * ms), Count: 49},
		{Longest: took(9 * ms), Count: 1},
	}
	for q, want := range map[float64]time.Duration{0: ms, 0.5: ms, 0.52: 2 * ms, 0.99: 2 * ms, 1: 8 * ms} {
		if got := Percentile(latency, 8*ms, q); got != want {
			t.Errorf("%v of the faults took at most %v, want %v", q, got, want)
		}
	}
	if got := Percentile(nil, ms, 0.5); got != 0 {
		t.Errorf("of no faults it is %v", got)
	}
}

func TestColumns(t *testing.T) {
	us := time.Microsecond
	got := Columns([]*migratedv1.LatencyBucket{
		{
			Longest: took(3 * us),
			Count:   1,
		}, {Longest: took(4 * us), Count: 2}, {Longest: took(5 * us), Count: 3}, {Longest: took(40 * us), Count: 4},
	})
	want := []Column{{4 * us, 3}, {8 * us, 3}, {16 * us, 0}, {32 * us, 0}, {64 * us, 4}}
	if !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if got := Columns(nil); got != nil {
		t.Errorf("of no faults there are %v", got)
	}
}
