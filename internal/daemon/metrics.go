// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"crypto/tls"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"time"

	"github.com/migrated-vm/migrated/internal/limits"
	"github.com/migrated-vm/migrated/internal/metrics"
	"github.com/migrated-vm/migrated/internal/migration"
	"github.com/migrated-vm/migrated/internal/mtls"
	"github.com/migrated-vm/migrated/internal/version"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// answerTime is how long an answer may take whose reader is slow. A profile of the CPU takes half a minute.
const answerTime = 2 * time.Minute

// newMetricsServer makes the server for Prometheus, and what it is to serve of the listener. Who gets in is decided as for
// the control API: at a Unix socket by its mode, over TCP by the limits, TLS where it is set, and the names in certificates.
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
	server := &http.Server{
		Handler:           pages,
		ReadHeaderTimeout: limits.HandshakeTime, // of the handshake as well
		ReadTimeout:       limits.HandshakeTime,
		WriteTimeout:      answerTime,
		IdleTimeout:       limits.IdleTime,
		MaxHeaderBytes:    limits.HeaderBytes,
		ErrorLog:          slog.NewLogLogger(d.log.Handler(), slog.LevelDebug), // whoever knocks must not fill the log
	}
	if listener.Addr().Network() == "unix" {
		return server, listener
	}
	listener = limits.NewPeers(d.refusals).Listener(listener)
	server.ConnState = func(c net.Conn, state http.ConnState) {
		if state == http.StateActive { // its first request comes
			limits.Established(c)
		}
	}
	if files, encrypted := d.cfg.TLS(); encrypted {
		listener = tls.NewListener(listener, files.ServerConfig("http/1.1"))
		server.Handler = d.forMetricsClients(pages)
	}
	return server, listener
}

// forMetricsClients lets those in whose certificates name them.
func (d *Daemon) forMetricsClients(pages http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := d.allowMetrics(mtls.NamesOf(r.TLS)); err != nil {
			d.refusals.Refused(limits.Caller, limits.NetworkOf(r.RemoteAddr), "error", err)
			http.Error(w, err.Error(), http.StatusForbidden)
			return
		}
		pages.ServeHTTP(w, r)
	})
}

// metricsState is what a scrape shows.
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

// metrics is what a scrape shows of the migrations, newest first.
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

// addTotals adds what a migration has to be counted for, of which view is a snapshot.
func addTotals(to *metrics.Totals, t tracked, view *migratedv1.Migration) {
	to.Add(view)
	if d, ok := t.(*migration.Destination); ok {
		d.AddCounts(&to.Incoming)
	}
}
