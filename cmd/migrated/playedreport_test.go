// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/migrated-vm/migrated/internal/report"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

func (p *played) Report(_ context.Context, r *migratedv1.ReportRequest) (*migratedv1.ReportResponse, error) {
	answer := &migratedv1.Report{Time: timestamppb.New(noon.Add(time.Hour)), Migration: at("bad-3", 150*ms, failed, 0),
		Timeline: changesOf(setup, device, failed),
		Source:   &migratedv1.HostVersions{Daemon: "1.2.3", Qemu: "7.2.22", Kernel: "6.12.41"}}
	switch r.GetId() {
	case "db-1":
		answer = reported()
		if r.GetRole() == migratedv1.MigrationRole_MIGRATION_ROLE_DESTINATION {
			answer.Migration.Role = r.GetRole()
		}
	case "bad-3":
	default:
		return nil, notFound(r.GetId())
	}
	answer.Findings = report.Findings(answer)
	return &migratedv1.ReportResponse{Report: answer}, nil
}

// changesOf returns a timeline in which each state lasts a quarter of a second longer than the one before.
func changesOf(states ...migratedv1.MigrationState) *migratedv1.Timeline {
	t := &migratedv1.Timeline{}
	after := time.Duration(0)
	for i, s := range states {
		after += time.Duration(i) * 250 * ms
		t.Changes = append(t.Changes, &migratedv1.StateChange{
			State: s, Time: timestamppb.New(noon.Add(after)), SinceStart: durationpb.New(after),
		})
	}
	return t
}

// reported returns the report of a migration that lost its connection once.
func reported() *migratedv1.Report {
	m := at("db-1", 2150*ms, completed, 262144)
	m.Progress.Residency, m.Progress.Faults = durationpb.New(1500*ms), 4096
	m.EarlyLoad = &migratedv1.EarlyLoad{
		Loaded:   true,
		Bytes:    1 << 20,
		Pause:    durationpb.New(3 * ms),
		LoadTime: durationpb.New(12 * ms),
	}
	micro := func(n int) *durationpb.Duration { return durationpb.New(time.Duration(n) * time.Microsecond) }
	in := &migratedv1.IncomingPages{
		Causes:      &migratedv1.FaultCauses{Missing: 3000, Swept: 200, Ahead: 800, Waiting: 60, Zero: 30, Present: 6},
		LatencySum:  durationpb.New(1100 * ms),
		DemandPages: 8000, SweepPages: 254144,
		DemandBytes: 30 << 20, SweepBytes: 768<<20 - 30<<20, UnpackedBytes: 900 << 20, BestBytesPerSecond: 812.4e6,
		LaneReconnections: 1, Paused: durationpb.New(500 * ms), LongestPause: durationpb.New(500 * ms),
		EarlyFaults: 3, EarlyFaultMax: micro(700),
	}
	for i, n := range []uint64{2, 40, 1200, 1900, 700, 150, 60, 10, 0, 0, 4, 0, 0, 1} {
		if n > 0 {
			in.Latency = append(in.Latency, &migratedv1.LatencyBucket{Longest: micro(60 << i), Count: n})
		}
	}
	quantile := func(q float64) *durationpb.Duration {
		return durationpb.New(report.Percentile(in.Latency, time.Second, q))
	}
	m.Progress.FaultP50, m.Progress.FaultP99, m.Progress.FaultMax = quantile(0.5), quantile(0.99), quantile(1)
	for i := range uint64(16) {
		share := i + i/15 // of 16
		if i >= 5 && i < 10 {
			share = 5 // while the connection is lost
		}
		in.Samples = append(in.Samples, &migratedv1.PageSample{SinceSwitch: durationpb.New(time.Duration(i) * 100 * ms),
			PagesPresent: 262144 * share / 16, BytesOnWire: (768 << 20) * share / 16, Faults: 4096 * share / 16})
	}
	r := &migratedv1.Report{
		Time: timestamppb.New(noon.Add(time.Hour)), Migration: m, Incoming: in, Protocol: 2,
		Timeline:            changesOf(setup, device, active, completed),
		DestinationTimeline: changesOf(setup, device, active, paused, resumed, active, completed),
		DowntimeSteps: &migratedv1.DowntimeSteps{
			StopTime:     micro(800),
			SaveTime:     micro(1400),
			TransferTime: micro(400),
			LoadTime:     micro(250),
			CommitTime:   micro(100),
			CrossingTime: micro(0),
			ContinueTime: micro(500),
		},
		Source:      &migratedv1.HostVersions{Daemon: "1.2.3", Qemu: "7.2.22", Kernel: "6.12.41"},
		Destination: &migratedv1.HostVersions{Daemon: "1.2.3", Qemu: "10.0.2", Kernel: "6.12.41"},
		Check: &migratedv1.EarlierCheck{
			Time: timestamppb.New(noon.Add(-time.Minute)),
			Results: []*migratedv1.CheckResult{
				{
					Subject: "huge pages",
					Status:  migratedv1.CheckStatus_CHECK_STATUS_WARNING,
					Detail:  "host-b has 12 free,\nthe VM uses 16",
					Remedy:  "reserve more: sysctl vm.nr_hugepages=20",
					Host:    migratedv1.MigrationRole_MIGRATION_ROLE_DESTINATION,
				},
			},
		},
	}
	r.Findings = report.Findings(r)
	return r
}
