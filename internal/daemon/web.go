// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"crypto/x509"
	"net"
	"net/http"
	"time"

	"google.golang.org/grpc"

	"github.com/migrated-vm/migrated/internal/limits"
	"github.com/migrated-vm/migrated/internal/web"
	"github.com/migrated-vm/migrated/pkg/mtls"
)

// pageTime is how long open pages are waited for when the daemon stops, to receive the message that it does.
const pageTime = time.Second

// webServer serves the control API over HTTP. server receives requests, and turns them into calls to control, over
// bridge.
type webServer struct {
	server   *http.Server
	listener net.Listener // for server
	control  *grpc.Server
	bridge   *web.Bridge
	conn     *grpc.ClientConn
}

// newWebServer makes the servers of http_listen. The same callers are allowed as for the control API over gRPC.
func (d *Daemon) newWebServer(listener net.Listener) (*webServer, error) {
	w := &webServer{bridge: web.NewBridge()}
	w.control = d.controlServer(w.bridge.ServerOptions())
	var err error
	if w.conn, err = w.bridge.Dial(); err != nil {
		return nil, err
	}
	options := web.Options{Control: w.conn, Stopping: d.stopping, Foreign: func(r *http.Request, why error) {
		d.refusals.Refused(limits.Foreign, limits.NetworkOf(r.RemoteAddr), "error", why)
	}}
	if files, encrypted := d.cfg.TLS(); encrypted {
		options.Certificate = func() (*x509.Certificate, error) {
			all, err := mtls.Certificates(files.Certificate)
			if err != nil {
				return nil, err
			}
			return all[0], nil
		}
	}
	pages, err := web.NewHandler(options)
	if err != nil {
		w.close()
		return nil, err
	}
	w.server, w.listener = d.newHTTPServer(listener)
	w.server.WriteTimeout = web.WriteTime
	w.server.Handler = d.onlyFor(d.allowOperator, pages, web.Refuse)
	return w, nil
}

func (w *webServer) close() { _ = w.conn.Close() } // no call is under way

// stopPages stops an HTTP server. Pages that watch have pageTime to receive the message that the daemon ends.
func stopPages(server *http.Server) {
	ctx, cancel := context.WithTimeout(context.Background(), pageTime)
	defer cancel()
	if err := server.Shutdown(ctx); err != nil {
		_ = server.Close() // cuts a scrape or a page short; the restarted daemon answers the next one
	}
}
