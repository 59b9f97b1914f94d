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
	// shownAfter is how long a migration that is over still has series of its own, so that several scrapes see its last
	// figures.
	shownAfter = 10 * time.Minute
	// mostShown is the most migrations with series of their own. The newest have them.
	mostShown = 64
	// scrapesAtOnce is the most scrapes at once: enough for two Prometheus servers and a person.
	scrapesAtOnce = 3
)

// Handler returns a handler that answers scrapes. It calls read once for each.
func Handler(read func() *State, log *slog.Logger) http.Handler {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collector(read))
	return promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		ErrorLog: scrapeLog{log}, ErrorHandling: promhttp.ContinueOnError, MaxRequestsInFlight: scrapesAtOnce,
	})
}

// scrapeLog logs errors of scrapes. It implements promhttp.Logger.
type scrapeLog struct{ *slog.Logger }

// Println logs an error.
func (l scrapeLog) Println(v ...any) { l.Warn("a scrape of the metrics is not whole", "error", v) }

// collector makes the metrics of a State. It implements prometheus.Collector.
type collector func() *State

// Describe sends the descriptions of all families.
func (collector) Describe(to chan<- *prometheus.Desc) {
	for _, f := range families {
		to <- f.desc
	}
}

// Collect reads a State, and sends its metrics.
func (c collector) Collect(to chan<- prometheus.Metric) {
	s := c()
	send(to, buildInfo, 1, s.Version, strconv.FormatUint(uint64(s.Protocol), 10))
	collectMigrations(to, s.Migrations)
	for _, role := range roles {
		r := s.Totals.of(role)
		for _, state := range states(true) { // zeros, too: Prometheus sees no increase in a counter that begins at 1
			send(to, ended, float64(r.Ended[state]), migration.RoleName(role), migration.StateName(state))
		}
		sendHistogram(to, downtime, downtimeBounds, &r.Downtime, migration.RoleName(role))
	}
	collectIncoming(to, &s.Totals.Incoming)
	for kind, n := range s.Refusals {
		send(to, refusals, float64(n), kind)
	}
	for setting, expires := range s.Certificates {
		send(to, expiry, float64(expires.Unix()), setting)
	}
}

// collectIncoming sends the counts of migrations to this host.
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
	send(to, lostPages, float64(c.LostPages))
	send(to, received, float64(c.DemandBytes), "demand")
	send(to, received, float64(c.BulkBytes), "sweep")
	send(to, discarded, float64(c.DiscardedBytes))
	send(to, lostLanes, float64(c.BulkLanesLost))
	send(to, reconnects, float64(c.LaneReconnections))
}

// collectMigrations sends the series of single migrations, which are sorted newest first, and the numbers of those that
// are not over.
func collectMigrations(to chan<- prometheus.Metric, migrations []Migration) {
	type group struct{ role, state string }
	groups, late := make(map[group]int), make(map[migratedv1.MigrationRole]int)
	waiting, stopped, shown, queue := 0, 0, 0, 0
	for _, m := range migrations {
		v := m.View
		over := m.Times.Over > 0
		if !over && !m.Left {
			groups[group{migration.RoleName(v.GetRole()), migration.StateName(v.GetState())}]++
			if v.GetOverdue() {
				late[v.GetRole()]++
			}
			if v.GetWaiting() != "" {
				queue++
			}
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
		send(to, overdue, float64(late[role]), migration.RoleName(role))
		for _, state := range states(false) {
			send(to, underWay, float64(groups[group{migration.RoleName(role), migration.StateName(state)}]),
				migration.RoleName(role), migration.StateName(state))
		}
	}
	send(to, queued, float64(queue))
	send(to, waitingVMs, float64(waiting))
	send(to, stoppedVMs, float64(stopped))
}

// stoppedCommitted says whether a migration away from this host is past the commit point and it is not known whether
// the VM runs. Of a migration that was left, nothing is known but the record of its commit.
func stoppedCommitted(m Migration) bool {
	if m.Left || m.View.GetState() == migratedv1.MigrationState_MIGRATION_STATE_HANDOVER {
		return true
	}
	knownToRun := m.View.GetLocation() != migratedv1.Location_LOCATION_UNKNOWN &&
		m.View.GetLocation() != migratedv1.Location_LOCATION_NOWHERE
	return m.Times.Paused > 0 && !knownToRun
}

// collectMigration sends the series of one migration.
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
	if err != nil { // a label that is not UTF-8, for instance; the scrape then shows the error
		m = prometheus.NewInvalidMetric(f.desc, err)
	}
	to <- m
}

var roles = []migratedv1.MigrationRole{
	migratedv1.MigrationRole_MIGRATION_ROLE_SOURCE, migratedv1.MigrationRole_MIGRATION_ROLE_DESTINATION,
}

// states returns all terminal states, or all that are not terminal.
func states(terminal bool) (all []migratedv1.MigrationState) {
	for number := range migratedv1.MigrationState_name {
		state := migratedv1.MigrationState(number)
		if state != migratedv1.MigrationState_MIGRATION_STATE_UNSPECIFIED && migration.Terminal(state) == terminal {
			all = append(all, state)
		}
	}
	return all
}
