// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/e2e/promtool"
	"github.com/migrated-vm/migrated/internal/bandwidth"
	"github.com/migrated-vm/migrated/pkg/testenv"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// metricsSocket is the socket at which the lab's daemons serve metrics, if a test asks them to.
const metricsSocket = "/run/migrated/metrics.sock"

// scrape returns the current metrics of a host's daemon.
func scrape(t *testing.T, h *lab.Host) string {
	t.Helper()
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", h.Path(metricsSocket))
	}}
	defer transport.CloseIdleConnections()
	request, err := http.NewRequestWithContext(testContext(t), http.MethodGet, "http://daemon/metrics", http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := transport.RoundTrip(request)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil || answer.StatusCode != http.StatusOK {
		t.Fatalf("a scrape: %s, %v\n%s", answer.Status, err, text)
	}
	return string(text)
}

// sum returns the sum of the series of a metric that have all of the labels, and their number.
func sum(t *testing.T, scrape, metric string, labels ...string) (total float64, found int) {
	t.Helper()
	for line := range strings.Lines(scrape) {
		name, rest, some := strings.Cut(strings.TrimSpace(line), "{")
		if !some {
			name, _, _ = strings.Cut(name, " ")
		}
		if name != metric || slices.ContainsFunc(labels, func(label string) bool { return !strings.Contains(rest, label) }) {
			continue
		}
		value, err := strconv.ParseFloat(strings.TrimSpace(line[strings.LastIndexByte(line, ' '):]), 64)
		if err != nil {
			t.Fatal(err)
		}
		total += value
		found++
	}
	return total, found
}

// statusJSON returns what "migrated status --json" prints on a host.
func statusJSON(t *testing.T, h *lab.Host, id string) *migratedv1.Migration {
	t.Helper()
	out, err := h.Migrated(testContext(t), "status", id, "--json")
	if err != nil {
		t.Fatal(err)
	}
	var m migratedv1.Migration
	if err := protojson.Unmarshal([]byte(out), &m); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return &m
}

// TestMetricsAreTheTruth scrapes both daemons while a VM moves, and then compares the metrics with "migrated status".
// No alert fires for this migration. Every query of the dashboard has a result, also in a Prometheus that scraped the
// migration. A trace collector receives the spans of the migration. The reports of both hosts agree with the status,
// also after their daemons were restarted.
func TestMetricsAreTheTruth(t *testing.T) {
	t.Parallel()
	l, id := newHosts(t), newIdentity(t)
	serve := []string{"--metrics-listen", metricsSocket, "--traces-to", collectorAt}
	traces := startCollector(t, l)
	settings := [][]string{append(id.args(nameA, "a", nameB), serve...), append(id.args(nameB, "b", nameA), serve...)}
	daemons := []*lab.Process{startDaemon(t, l.A, settings[0]...), startDaemon(t, l.B, settings[1]...)}
	server := startPrometheus(t, l)
	s := newScene(t, l)
	if total, found := sum(t, scrape(t, l.B), "migrated_pages_total"); total != 0 || found == 0 {
		t.Errorf("%v pages came before there was a migration, by %d series", total, found)
	}
	client := control(t, l.A)
	if _, err := client.Check(traced(testContext(t)), &migratedv1.CheckRequest{Vm: lab.QMPPath}); err != nil {
		t.Fatal(err)
	}
	spec := s.spec()
	spec.Bandwidth = bandwidth.Least // until the VM has waited for pages: else some figures have no value
	if _, err := client.Start(traced(testContext(t)), &migratedv1.StartRequest{Id: "m", Spec: spec}); err != nil {
		t.Fatal(err)
	}
	awaitState(t, client, "m", stateActive)
	await(t, control(t, l.B), "m", func(m *migratedv1.Migration) bool {
		return m.GetProgress().GetFaults() > 1 && m.GetProgress().GetFaultP50().AsDuration() > 0
	})
	lift := &migratedv1.SetBandwidthRequest{Id: "m"}
	if _, err := control(t, l.B).SetBandwidth(traced(testContext(t)), lift); err != nil {
		t.Fatal(err)
	}
	await(t, client, "m", func(*migratedv1.Migration) bool {
		scrape(t, l.A)
		scrape(t, l.B)
		return false
	})
	traces.check(t)
	there, here := statusJSON(t, l.A, "m"), statusJSON(t, l.B, "m")
	checkFigures(t, there)
	source, destination := scrape(t, l.A), scrape(t, l.B)
	p := here.GetProgress()
	one := `migration="m"`
	for _, c := range []struct {
		scrape, metric string
		labels         []string
		want           float64
	}{
		{source, "migrated_migration_downtime_seconds_sum", []string{`role="source"`},
			there.GetProgress().GetDowntime().AsDuration().Seconds()},
		{source, "migrated_migrations_ended_total", []string{`role="source"`, `state="completed"`}, 1},
		{source, "migrated_migration_data_remaining_bytes", []string{one}, 0},
		{source, "migrated_vms_stopped_committed", nil, 0},
		{destination, "migrated_migration_downtime_seconds_sum", []string{`role="destination"`},
			p.GetDowntime().AsDuration().Seconds()},
		{destination, "migrated_migrations_ended_total", []string{`role="destination"`, `state="completed"`}, 1},
		{destination, "migrated_migration_data_remaining_bytes", []string{one}, 0},
		{destination, "migrated_migration_memory_bytes", []string{one}, float64(p.GetBytesTotal())},
		{destination, "migrated_migration_received_bytes", []string{one}, float64(p.GetBytesOnWire())},
		{destination, "migrated_migration_paused_seconds", []string{one}, 0},
		{destination, "migrated_received_bytes_total", nil, float64(p.GetBytesOnWire())},
		{destination, "migrated_faults_total", nil, float64(p.GetFaults())},
		{destination, "migrated_pages_zero_total", nil, float64(p.GetPagesZero())},
		{destination, "migrated_pages_guessed_total", nil, float64(p.GetPagesGuessed())},
		{destination, "migrated_discarded_bytes_total", nil, float64(p.GetBytesDiscarded())},
		{destination, "migrated_lane_reconnects_total", nil, 0},
		{destination, "migrated_vms_waiting_for_pages", nil, 0},
	} {
		if got, found := sum(t, c.scrape, c.metric, c.labels...); found == 0 || got != c.want {
			t.Errorf("%s%v is %v in %d series, want %v as status says", c.metric, c.labels, got, found, c.want)
		}
	}
	// Buckets are cumulative: those below the slowest fault do not count it, those above count all faults.
	slowest := p.GetFaultMax().AsDuration().Seconds()
	timed, _ := sum(t, destination, "migrated_fault_latency_seconds_count")
	if timed == 0 || timed > float64(p.GetFaults()) {
		t.Errorf("%v faults were timed, of %d", timed, p.GetFaults())
	}
	buckets := 0
	for line := range strings.Lines(destination) {
		_, rest, bucket := strings.Cut(line, `migrated_fault_latency_seconds_bucket{le="`)
		bound, count, _ := strings.Cut(strings.TrimSpace(rest), `"} `)
		le, err := strconv.ParseFloat(bound, 64)
		if !bucket || err != nil {
			continue
		}
		n, err := strconv.ParseFloat(count, 64)
		if err != nil || (le < slowest && n >= timed) || (le > slowest*17/16 && n != timed) {
			t.Errorf("%v of %v faults took at most %v s, the slowest %v s (%v)", n, timed, le, slowest, err)
		}
		buckets++
	}
	if buckets < 2 {
		t.Errorf("the histogram of the faults has %d buckets", buckets)
	}
	if t.Failed() {
		t.Logf("source:\n%s\ndestination:\n%s", source, destination)
	}
	evaluate(t, map[string]string{"a": source, "b": destination})
	checkDashboard(t, server)
	checkReports(t, l, "m")
	checkReportsStay(t, l, "m", daemons, settings)
}

// startPrometheus starts a Prometheus that scrapes the daemons of both hosts, through proxies on this machine's
// loopback.
func startPrometheus(t *testing.T, l *lab.Lab) *promtool.Server {
	t.Helper()
	if _, err := promtool.Find(testContext(t)); err != nil {
		testenv.CannotRun(t, "no Prometheus: %v", err)
	}
	targets := map[string]string{}
	for _, h := range l.Hosts() {
		transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", h.Path(metricsSocket))
		}}
		proxy := httptest.NewServer(&httputil.ReverseProxy{
			Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(&url.URL{Scheme: "http", Host: "daemon"}) }, Transport: transport,
			ErrorLog: log.New(io.Discard, "", 0), // errors while a daemon is restarted
		})
		t.Cleanup(func() { proxy.Close(); transport.CloseIdleConnections() })
		targets[h.Name] = proxy.Listener.Addr().String()
	}
	server, err := promtool.Serve(testContext(t), targets)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Close(); err != nil {
			t.Error(err)
		}
	})
	return server
}

// checkDashboard checks that a Prometheus that scraped the migration has a result for each query of the dashboard.
func checkDashboard(t *testing.T, server *promtool.Server) {
	t.Helper()
	queries, err := promtool.Queries("../deploy/monitoring/dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	for _, query := range queries {
		eventually(t, func() error { // the next scrape may still be missing
			found, err := server.Values(testContext(t), query)
			if err != nil {
				t.Fatal(err)
			}
			if found == 0 {
				return fmt.Errorf("Prometheus has no answer to %s", query)
			}
			return nil
		})
	}
}

// evaluate runs promtool with the scrapes: no alert of deploy/monitoring fires, and each query of its dashboard has a
// result.
func evaluate(t *testing.T, scrapes map[string]string) {
	t.Helper()
	if _, err := promtool.Find(testContext(t)); err != nil {
		testenv.CannotRun(t, "no promtool: %v", err)
	}
	queries, err := promtool.Queries("../deploy/monitoring/dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := promtool.Evaluate(testContext(t), scrapes, "../deploy/monitoring/alerts.yml", nil, queries); err != nil {
		t.Error(err)
	}
}
