// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/internal/report"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// reportOf returns a host's report of a migration.
func reportOf(t *testing.T, h *lab.Host, id string) *migratedv1.Report {
	t.Helper()
	answer, err := control(t, h).Report(testContext(t), &migratedv1.ReportRequest{Id: id})
	if err != nil {
		t.Fatal(err)
	}
	return answer.GetReport()
}

func statesOf(line *migratedv1.Timeline) (states []migratedv1.MigrationState) {
	for _, c := range line.GetChanges() {
		states = append(states, c.GetState())
	}
	return states
}

// checkReports compares the reports of a completed migration with what "migrated status" says on its hosts, and with
// each other. The VM must have been checked before the migration.
func checkReports(t *testing.T, l *lab.Lab, id string) {
	t.Helper()
	source, destination := reportOf(t, l.A, id), reportOf(t, l.B, id)
	if status := get(t, l.A, id); !proto.Equal(source.GetMigration(), status) {
		t.Errorf("the source reports\n%v, its status is\n%v", source.GetMigration(), status)
	}
	if status := get(t, l.B, id); !proto.Equal(destination.GetMigration(), status) {
		t.Errorf("the destination reports\n%v, its status is\n%v", destination.GetMigration(), status)
	}
	in, p := destination.GetIncoming(), destination.GetMigration().GetProgress()
	if !proto.Equal(source.GetIncoming(), in) ||
		!proto.Equal(source.GetDestinationTimeline(), destination.GetTimeline()) {
		t.Errorf("the destination has counted\n%v\nand told\n%v", in, source.GetIncoming())
	}
	c := in.GetCauses()
	n := c.GetMissing() + c.GetSwept() + c.GetAhead() + c.GetWaiting() + c.GetZero() + c.GetPresent()
	if n != p.GetFaults() {
		t.Errorf("%d faults have a cause, of %d", n, p.GetFaults())
	}
	if n := in.GetDemandBytes() + in.GetSweepBytes(); n != p.GetBytesOnWire() || in.GetUnpackedBytes() < n {
		t.Errorf("%d bytes came, as %d, and status says %d", in.GetUnpackedBytes(), n, p.GetBytesOnWire())
	}
	for q, want := range map[float64]time.Duration{
		0.5: p.GetFaultP50().AsDuration(), 0.99: p.GetFaultP99().AsDuration(), 1: p.GetFaultMax().AsDuration(),
	} {
		if got := report.Percentile(in.GetLatency(), p.GetFaultMax().AsDuration(), q); got != want {
			t.Errorf("%v of the faults took at most %v by the buckets, %v as status says", q, got, want)
		}
	}
	samples := in.GetSamples()
	if len(samples) == 0 {
		t.Fatalf("the destination has no samples: %v", in)
	}
	last := samples[len(samples)-1]
	if last.GetPagesPresent() != p.GetPagesTotal() || last.GetBytesOnWire() != p.GetBytesOnWire() ||
		last.GetFaults() != p.GetFaults() ||
		last.GetSinceSwitch().AsDuration() != p.GetResidency().AsDuration() {
		t.Errorf("the last sample is %v, and status says %v", last, p)
	}
	var sum time.Duration
	for _, step := range report.Steps(source.GetDowntimeSteps()) {
		sum += step.Took.AsDuration()
	}
	downtime := source.GetMigration().GetProgress().GetDowntime().AsDuration()
	if (sum - downtime).Abs() > downtime/20 {
		t.Errorf("the steps add up to %v, and the VM stood still for %v: %v", sum, downtime, source.GetDowntimeSteps())
	}
	wanted := []migratedv1.MigrationState{
		migratedv1.MigrationState_MIGRATION_STATE_SETUP, stateDevice,
		stateActive, stateCompleted,
	}
	if a, b := statesOf(source.GetTimeline()), statesOf(destination.GetTimeline()); !slices.Equal(a, wanted) ||
		!slices.Equal(b, wanted) {
		t.Errorf("the states were %v at the source, and %v at the destination", a, b)
	}
	for _, r := range []*migratedv1.Report{source, destination} {
		for _, v := range []*migratedv1.HostVersions{r.GetSource(), r.GetDestination()} {
			if v.GetDaemon() == "" || v.GetQemu() == "" || v.GetKernel() == "" {
				t.Errorf("the versions are %v", v)
			}
		}
		if r.GetProtocol() == 0 || len(r.GetFindings()) == 0 || r.GetTakenUp() {
			t.Errorf("protocol %d, taken up %t, findings %v", r.GetProtocol(), r.GetTakenUp(), r.GetFindings())
		}
	}
	if source.GetCheck().GetTime() == nil {
		t.Error("the source does not report that the VM was checked")
	}
}

// checkReportsStay restarts the daemons of both hosts, and checks that the reports are the same as before. The VM must
// have waited for pages: the page has a picture of that.
func checkReportsStay(t *testing.T, l *lab.Lab, id string, daemons []*lab.Process, settings [][]string) {
	t.Helper()
	for i, h := range l.Hosts() {
		before := reportOf(t, h, id)
		if err := daemons[i].Stop(testContext(t)); err != nil {
			t.Fatal(err)
		}
		startDaemon(t, h, settings[i]...)
		after := reportOf(t, h, id)
		before.Time, after.Time = nil, nil // the time of the call, and the end of the migration
		if !proto.Equal(before, after) {
			t.Errorf("host %s reports\n%v\nand after its daemon was started again\n%v", h.Name, before, after)
		}
	}
	page, err := l.A.Migrated(testContext(t), "report", id, "--output", "html")
	if err != nil || !strings.Contains(page, "</html>") || strings.Count(page, "<svg") < 5 {
		t.Errorf("the page of the source is\n%s\n%v", page, err)
	}
}
