// SPDX-License-Identifier: Apache-2.0

// Package web serves the control API as JSON over HTTP, and a page that shows migrations.
//
//	browser, curl ─► limits, TLS, names (package daemon) ─► guard ─┬► gateway ─► Bridge ─► the control API's gRPC server
//	                                                               └► the page, and its events
//
// The gateway is generated from proto/migrated/v1/http.yaml. It only turns requests into calls, and does not decide who
// may make them.
package web

import (
	"crypto/x509"
	"net"
	"net/http"
	"net/netip"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// Options are the options of a handler.
type Options struct {
	// Control is the connection to the control API, from Bridge.Dial.
	Control *grpc.ClientConn
	// Certificate returns this daemon's certificate, which has the names that requests may be for; nil: there is no TLS.
	Certificate func() (*x509.Certificate, error)
	// Foreign is called with requests that are refused because another site may have sent them.
	Foreign func(r *http.Request, why error)
	// Stopping is closed when the daemon is about to end.
	Stopping <-chan struct{}
}

// NewHandler returns the handler of the control API and of the page.
func NewHandler(o Options) (http.Handler, error) {
	api, err := newGateway(o.Control)
	if err != nil {
		return nil, err
	}
	pages := http.NewServeMux()
	pages.Handle("/v1/", api)
	pages.Handle("GET "+eventsPath,
		&events{control: migratedv1.NewControlServiceClient(o.Control), stopping: o.Stopping})
	for path, f := range page {
		pages.Handle("GET "+path, f)
	}
	pages.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		refuse(w, http.StatusNotFound, codes.NotFound, r.Method+" "+r.URL.Path+": there is nothing here",
			"the page is at /, the control API below /v1/")
	})
	g := &guard{names: o.Certificate, foreign: o.Foreign, streams: newPlaces(mostStreams, mostStreamsOfOne)}
	return g.protect(withCaller(pages)), nil
}

// withCaller puts the caller into the context of a request, as gRPC does.
func withCaller(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		caller := &peer.Peer{Addr: addressOf(r)}
		if r.TLS != nil {
			caller.AuthInfo = credentials.TLSInfo{
				State:          *r.TLS,
				CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
			}
		}
		next.ServeHTTP(w, r.WithContext(peer.NewContext(r.Context(), caller)))
	})
}

// addressOf returns the address that a request comes from. For a Unix socket it is the socket, as in gRPC.
func addressOf(r *http.Request) net.Addr {
	if address, err := netip.ParseAddrPort(r.RemoteAddr); err == nil {
		return net.TCPAddrFromAddrPort(address)
	}
	return &net.UnixAddr{Name: r.RemoteAddr, Net: "unix"}
}
