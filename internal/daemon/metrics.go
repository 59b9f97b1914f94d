// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"net"
	"net/http"
	"net/http/pprof"
	"time"

	"github.com/migrated-vm/migrated/internal/metrics"
	"github.com/migrated-vm/migrated/internal/migration"
	"github.com/migrated-vm/migrated/internal/version"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// answerTime bounds the time to write an answer to a slow reader. A CPU profile takes half a minute.
const answerTime = 2 * time.Minute

// newMetricsServer makes the server for Prometheus, and the listener that it is to serve.
func (d *Daemon) newMetricsServer(listener net.Listener) (*http.Server, net.Listener) {
	pages := http.NewServeMux()
	pages.Handle("GET /metrics", metrics.Handler(d.metricsState, d.log))
	if d.cfg.Pprof {
		pages.HandleFunc("GET /debug/pprof/", pprof.Index)
		pages.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
		pages.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
		pages.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
		pages.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	}
	server, listener := d.newHTTPServer(listener)
	server.WriteTimeout = answerTime
	server.Handler = d.onlyFor(d.allowMetrics, pages, func(w http.ResponseWriter, err error) {
		http.Error(w, err.Error(), http.StatusForbidden)
	})
	return server, listener
}

// metricsState returns the state that a scrape shows.
func (d *Daemon) metricsState() *metrics.State {
	s := &metrics.State{Version: d.version, Protocol: version.Protocol, Refusals: d.refusals.ByKind()}
	s.Migrations, s.Totals = d.migrations.metrics()
	s.Certificates = make(map[string]time.Time)
	for _, f := range d.certificates() {
		if f.err != nil {
			d.log.Warn("when a certificate expires is not known", "setting", f.setting, "error", f.err)
			continue
		}
		s.Certificates[f.setting] = f.expires
	}
	return s
}

// metrics returns the migrations that a scrape shows, newest first, and the totals of all.
func (r *registry) metrics() (migrations []metrics.Migration, totals metrics.Totals) {
	r.mu.Lock()
	defer r.mu.Unlock()
	totals.AddAll(&r.forgotten)
	show := func(t tracked, left bool) {
		view, _ := t.Snapshot()
		migrations = append(migrations, metrics.Migration{View: view, Times: t.Times(), Left: left})
		if !left {
			addTotals(&totals, t, view)
		}
	}
	for _, s := range r.sources {
		show(s, false)
	}
	for _, d := range r.destinations {
		show(d, false)
	}
	for _, l := range r.leftovers {
		show(l, true)
	}
	metrics.NewestFirst(migrations)
	return migrations, totals
}

// addTotals adds the counts of a migration. view is its snapshot.
func addTotals(to *metrics.Totals, t tracked, view *migratedv1.Migration) {
	to.Add(view)
	if d, ok := t.(*migration.Destination); ok {
		d.AddCounts(&to.Incoming)
	}
}
