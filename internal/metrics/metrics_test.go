// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"flag"
	"fmt"
	"log/slog"
	"math"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/migrated-vm/migrated/internal/migration"
	"github.com/migrated-vm/migrated/pkg/postcopy"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

//go:generate go test -trimpath -vet=off -count=1 -run ^TestReference$ . -update

var update = flag.Bool("update", false, "write docs/metrics.md anew")

// TestReference compares the table of docs/metrics.md with the families.
func TestReference(t *testing.T) {
	const path, begin, end = "../../docs/metrics.md", "<!-- begin of the families -->\n", "<!-- end of the families -->\n"
	var table strings.Builder
	table.WriteString("| metric | kind | labels | |\n|---|---|---|---|\n")
	for _, f := range families {
		fmt.Fprintf(&table, "| `%s` | %s | %s | %s |\n", f.name, f.kind, strings.Join(f.labels, ", "), f.help)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(text), begin)
	_, after, also := strings.Cut(rest, end)
	if !ok || !also {
		t.Fatalf("%s has no place for the families", path)
	}
	want := before + begin + table.String() + end + after
	if want == string(text) {
		return
	}
	if !*update {
		t.Fatalf("%s is not what the families say: make generate", path)
	}
	if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
		t.Fatal(err)
	}
}

// aState returns a State that has a value for each family.
func aState() *State {
	s := &State{
		Version: "v1.2.3", Protocol: 4, Refusals: map[string]uint64{"caller": 2},
		Certificates: map[string]time.Time{"tls_certificate": time.Unix(2_000_000_000, 0)},
	}
	view := func(id string, role migratedv1.MigrationRole, state migratedv1.MigrationState) *migratedv1.Migration {
		return &migratedv1.Migration{
			Id: id, Role: role, State: state, VmName: "db \"1\"", CreateTime: timestamppb.Now(),
			Location: migratedv1.Location_LOCATION_DESTINATION,
			Progress: &migratedv1.Progress{
				PagesTotal: 100, PagesPresent: 75, BytesTotal: 409600, BytesOnWire: 200000,
				Downtime: durationpb.New(3 * time.Millisecond),
			},
		}
	}
	const source, destination = migratedv1.MigrationRole_MIGRATION_ROLE_SOURCE,
		migratedv1.MigrationRole_MIGRATION_ROLE_DESTINATION
	paused := view("paused", destination, migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_PAUSED)
	handover := view("handover", source, migratedv1.MigrationState_MIGRATION_STATE_HANDOVER)
	handover.Progress.Downtime = nil
	old := view("old", source, migratedv1.MigrationState_MIGRATION_STATE_COMPLETED)
	s.Migrations = []Migration{
		{View: paused, Times: migration.Times{
			In: map[migratedv1.MigrationState]time.Duration{
				migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_PAUSED: 90 * time.Second,
			},
			Paused: 90 * time.Second,
		}},
		{View: handover, Times: migration.Times{
			In: map[migratedv1.MigrationState]time.Duration{migratedv1.MigrationState_MIGRATION_STATE_HANDOVER: time.Second},
		}},
		{View: old, Times: migration.Times{Over: time.Hour}},
		{View: &migratedv1.Migration{
			Id: "queued", Role: source, State: migratedv1.MigrationState_MIGRATION_STATE_SETUP, Waiting: "it is the next",
		}},
		{View: &migratedv1.Migration{Id: "left", Role: source}, Left: true},
	}
	for _, v := range []*migratedv1.Migration{paused, handover, old} {
		s.Totals.Add(v)
	}
	s.Totals.Incoming.DemandPages, s.Totals.Incoming.Faults.Missing = 7, 5
	s.Totals.Incoming.Latency.Record(100 * time.Microsecond)
	return s
}

func scrape(t *testing.T, s *State) string {
	t.Helper()
	answer := httptest.NewRecorder()
	Handler(func() *State { return s }, slog.New(slog.DiscardHandler)).ServeHTTP(
		answer, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	if answer.Code != 200 {
		t.Fatalf("a scrape has status %d: %s", answer.Code, answer.Body)
	}
	return answer.Body.String()
}

func TestScrape(t *testing.T) {
	text := scrape(t, aState())
	for _, line := range []string{
		`migrated_build_info{protocol="4",version="v1.2.3"} 1`,
		`migrated_migrations{role="destination",state="postcopy-paused"} 1`,
		`migrated_migrations{role="source",state="handover"} 1`,
		`migrated_migrations_ended_total{role="source",state="completed"} 1`,
		`migrated_migrations_ended_total{role="source",state="failed"} 0`,
		`migrated_migration_downtime_seconds_sum{role="source"} 0.003`,
		`migrated_migration_data_remaining_bytes{migration="paused",role="destination",vm="db \"1\""} 102400`,
		`migrated_migration_paused_seconds{migration="paused",role="destination",vm="db \"1\""} 90`,
		`migrated_migration_phase_seconds{migration="paused",phase="postcopy-paused",role="destination",vm="db \"1\""} 90`,
		`migrated_vms_waiting_for_pages 1`,
		`migrated_vms_stopped_committed 2`,
		`migrated_migrations_queued 1`,
		`migrated_pages_total{kind="demand"} 7`,
		`migrated_faults_total{cause="missing"} 5`,
		`migrated_fault_latency_seconds_bucket{le="6.4e-05"} 0`,
		`migrated_fault_latency_seconds_bucket{le="0.000128"} 1`,
		`migrated_refusals_total{kind="caller"} 2`,
		`migrated_certificate_expiry_timestamp_seconds{setting="tls_certificate"} 2e+09`,
	} {
		if !strings.Contains(text, line+"\n") {
			t.Errorf("the scrape has no line %s", line)
		}
	}
	for _, f := range families {
		if !strings.Contains(text, "# TYPE "+f.name+" "+f.kind+"\n") {
			t.Errorf("the scrape has no %s %s", f.kind, f.name)
		}
	}
	if strings.Contains(text, `migration="old"`) || strings.Contains(text, `migration="left"`) {
		t.Error("a migration that ended an hour ago, or was left, has series of its own")
	}
	problems, err := promlint.New(strings.NewReader(text)).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("promlint: %v, %v", problems, err)
	}
	if t.Failed() {
		t.Log(text)
	}
}

// TestNativeHistogram: each duration is in the native bucket for it.
func TestNativeHistogram(t *testing.T) {
	var h postcopy.Durations
	durations := []time.Duration{
		0, 1, 900, 1000, 70 * time.Microsecond, 71 * time.Microsecond, 5 * time.Millisecond, time.Second, time.Hour,
	}
	for _, d := range durations {
		h.Record(d)
	}
	var made dto.Metric
	m := &histogram{prometheus.NewDesc("h", "", nil, nil), nil, latencyBounds, &h}
	if err := m.Write(&made); err != nil {
		t.Fatal(err)
	}
	got := made.GetHistogram()
	if n := got.GetSampleCount(); n != uint64(len(durations)) {
		t.Errorf("%d samples, want %d", n, len(durations))
	}
	if zeros := got.GetZeroCount(); zeros != 2 {
		t.Errorf("%d durations of no length, want 2", zeros)
	}
	rest, index, count, next := durations[2:], int32(0), int64(0), 0
	for _, span := range got.GetPositiveSpan() {
		index += span.GetOffset()
		for range span.GetLength() {
			count += got.GetPositiveDelta()[next]
			next++
			upper := math.Exp2(float64(index) / (1 << schema))
			lower := math.Exp2(float64(index-1) / (1 << schema))
			for range count {
				d := rest[0].Seconds()
				rest = rest[1:]
				if d > upper || d < lower*(1-1./16) {
					t.Errorf("%v s counts from %v to %v s", d, lower, upper)
				}
			}
			index++
		}
	}
	if len(rest) > 0 || next != len(got.GetPositiveDelta()) {
		t.Errorf("%v are in no bucket", rest)
	}
	below := got.GetBucket()
	if last := below[len(below)-1].GetCumulativeCount(); last != uint64(len(durations)-1) { // an hour is beyond the last
		t.Errorf("%d durations are in a classic bucket, want all but one", last)
	}
}
