// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"crypto/tls"
	"log/slog"
	"net"
	"net/http"

	"github.com/migrated-vm/migrated/internal/limits"
	"github.com/migrated-vm/migrated/pkg/mtls"
)

// newHTTPServer makes a server without a handler, and the listener that it is to serve. Connections are admitted as for
// the control API: to a Unix socket by its mode; over TCP within the limits, and with TLS if it is set. The names in
// certificates are checked by onlyFor.
func (d *Daemon) newHTTPServer(listener net.Listener) (*http.Server, net.Listener) {
	server := &http.Server{
		ReadHeaderTimeout: limits.HandshakeTime, // bounds the TLS handshake as well
		ReadTimeout:       limits.HandshakeTime,
		IdleTimeout:       limits.IdleTime,
		MaxHeaderBytes:    limits.HeaderBytes,
		ErrorLog:          slog.NewLogLogger(d.log.Handler(), slog.LevelDebug), // strangers must not be able to fill the log
	}
	if listener.Addr().Network() == "unix" {
		return server, listener
	}
	listener = limits.NewPeers(d.refusals).Listener(listener)
	server.ConnState = func(c net.Conn, state http.ConnState) {
		if state == http.StateActive { // its first request arrives
			limits.Established(c)
		}
	}
	if files, encrypted := d.cfg.TLS(); encrypted {
		listener = tls.NewListener(listener, files.ServerConfig("http/1.1"))
	}
	return server, listener
}

// onlyFor serves pages to callers whose certificates have names that allow accepts, and calls refuse for others. A
// caller without TLS has passed the checks of newHTTPServer, and is served.
func (d *Daemon) onlyFor(allow mtls.Allow, pages http.Handler, refuse func(http.ResponseWriter, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.TLS != nil {
			if err := allow(mtls.NamesOf(r.TLS)); err != nil {
				d.refusals.Refused(limits.Caller, limits.NetworkOf(r.RemoteAddr), "error", err)
				refuse(w, err)
				return
			}
		}
		pages.ServeHTTP(w, r)
	})
}
