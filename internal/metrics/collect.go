// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"log/slog"
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/migrated-vm/migrated/internal/migration"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

const (
	// shownAfter is how long a migration that is over has series of its own: several scrapes see its last figures.
	shownAfter = 10 * time.Minute
	// mostShown bounds the migrations with series of their own, newest first, however many are made in that time.
	mostShown = 64
	// scrapesAtOnce is for two Prometheus servers and a person.
	scrapesAtOnce = 3
)

// Handler answers scrapes. read is called once for each.
func Handler(read func() *State, log *slog.Logger) http.Handler {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collector(read))
	return promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		ErrorLog: scrapeLog{log}, ErrorHandling: promhttp.ContinueOnError, MaxRequestsInFlight: scrapesAtOnce,
	})
}

// scrapeLog logs what is wrong with a scrape.
type scrapeLog struct{ *slog.Logger }

// Println is what promhttp calls.
func (l scrapeLog) Println(v ...any) { l.Warn("a scrape of the metrics is not whole", "error", v) }

// collector makes metrics of a State.
type collector func() *State

// Describe names all families.
func (collector) Describe(to chan<- *prometheus.Desc) {
	for _, f := range families {
		to <- f.desc
	}
}

// Collect reads a State.
func (c collector) Collect(to chan<- prometheus.Metric) {
	s := c()
	send(to, buildInfo, 1, s.Version, strconv.FormatUint(uint64(s.Protocol), 10))
	collectMigrations(to, s.Migrations)
	for _, role := range roles {
		r := s.Totals.of(role)
		for _, state := range states(true) { // also what has not happened: a counter that begins at 1 has not risen
			send(to, ended, float64(r.Ended[state]), migration.RoleName(role), migration.StateName(state))
		}
		sendHistogram(to, downtime, downtimeBounds, &r.Downtime, migration.RoleName(role))
	}
	collectIncoming(to, &s.Totals.Incoming)
	for kind, n := range s.Refusals {
		send(to, refusals, float64(n), kind)
	}
	for setting, at := range s.Certificates {
		send(to, expiry, float64(at.Unix()), setting)
	}
}

func collectIncoming(to chan<- prometheus.Metric, c *migration.Counts) {
	sendHistogram(to, faultLatency, latencyBounds, &c.Latency)
	for cause, n := range map[string]uint64{
		"missing": c.Faults.Missing, "swept": c.Faults.Swept, "ahead": c.Faults.Ahead,
		"waiting": c.Faults.Waiting, "zero": c.Faults.Zero, "present": c.Faults.Present,
	} {
		send(to, faults, float64(n), cause)
	}
	send(to, pages, float64(c.DemandPages), "demand")
	send(to, pages, float64(c.BulkPages), "sweep")
	send(to, zeroPages, float64(c.ZeroPages))
	send(to, guessedPages, float64(c.GuessedPages))
	send(to, touchedPages, float64(c.TouchedPages))
	send(to, unexplainedPages, float64(c.UnexplainedPages))
	send(to, received, float64(c.DemandBytes), "demand")
	send(to, received, float64(c.BulkBytes), "sweep")
	send(to, discarded, float64(c.DiscardedBytes))
	send(to, reconnects, float64(c.LaneReconnections))
}

// collectMigrations sends what is of single migrations, newest first, and what is counted of those that are not over.
func collectMigrations(to chan<- prometheus.Metric, migrations []Migration) {
	type group struct{ role, state string }
	groups := make(map[group]int)
	waiting, stopped, shown := 0, 0, 0
	for _, m := range migrations {
		v := m.View
		over := m.Times.Over > 0
		if !over && !m.Left {
			groups[group{migration.RoleName(v.GetRole()), migration.StateName(v.GetState())}]++
		}
		destination := v.GetRole() == migratedv1.MigrationRole_MIGRATION_ROLE_DESTINATION
		if destination && (m.Times.Paused > 0 || m.Left) {
			waiting++
		}
		if !destination && stoppedCommitted(m) {
			stopped++
		}
		if m.Left || m.Times.Over > shownAfter || shown >= mostShown {
			continue
		}
		shown++
		collectMigration(to, m)
	}
	for _, role := range roles {
		for _, state := range states(false) {
			send(to, underWay, float64(groups[group{migration.RoleName(role), migration.StateName(state)}]), migration.RoleName(role), migration.StateName(state))
		}
	}
	send(to, waitingVMs, float64(waiting))
	send(to, stoppedVMs, float64(stopped))
}

// stoppedCommitted says whether a migration away from this host is past the commit point, and nobody knows that the VM
// runs. One that was left has a record of the commit, which is all that is known of it.
func stoppedCommitted(m Migration) bool {
	if m.Left || m.View.GetState() == migratedv1.MigrationState_MIGRATION_STATE_HANDOVER {
		return true
	}
	somewhere := m.View.GetLocation() != migratedv1.Location_LOCATION_UNKNOWN && m.View.GetLocation() != migratedv1.Location_LOCATION_NOWHERE
	return m.Times.Paused > 0 && !somewhere
}

func collectMigration(to chan<- prometheus.Metric, m Migration) {
	v, p := m.View, m.View.GetProgress()
	vm := v.GetVmName()
	if vm == "" {
		vm = v.GetSpec().GetVm()
	}
	labels := []string{v.GetId(), vm, migration.RoleName(v.GetRole())}
	if total := p.GetPagesTotal(); total > 0 {
		send(to, remaining, float64(p.GetBytesTotal())*float64(total-p.GetPagesPresent())/float64(total), labels...)
		send(to, memory, float64(p.GetBytesTotal()), labels...)
		send(to, onWire, float64(p.GetBytesOnWire()), labels...)
	}
	send(to, pause, m.Times.Paused.Seconds(), labels...)
	for state, d := range m.Times.In {
		send(to, inState, d.Seconds(), append(labels[:3:3], migration.StateName(state))...)
	}
}

func send(to chan<- prometheus.Metric, f *family, value float64, labels ...string) {
	kind := prometheus.GaugeValue
	if f.kind == "counter" {
		kind = prometheus.CounterValue
	}
	m, err := prometheus.NewConstMetric(f.desc, kind, value, labels...)
	if err != nil { // of a label that is no text, say: what it is of is not left out in silence
		m = prometheus.NewInvalidMetric(f.desc, err)
	}
	to <- m
}

var roles = []migratedv1.MigrationRole{
	migratedv1.MigrationRole_MIGRATION_ROLE_SOURCE, migratedv1.MigrationRole_MIGRATION_ROLE_DESTINATION,
}

// states are those that are an end, or those that are none.
func states(terminal bool) (all []migratedv1.MigrationState) {
	for number := range migratedv1.MigrationState_name {
		state := migratedv1.MigrationState(number)
		if state != migratedv1.MigrationState_MIGRATION_STATE_UNSPECIFIED && migration.Terminal(state) == terminal {
			all = append(all, state)
		}
	}
	return all
}
