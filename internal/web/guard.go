// SPDX-License-Identifier: Apache-2.0

package web

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/migrated-vm/migrated/internal/limits"
)

const (
	// bodyBytes is the largest body of a request. The largest that is needed has the definition of a domain, of about ten
	// KB.
	bodyBytes = 1 << 20
	// WriteTime is how long one part of an answer may take to a slow reader.
	WriteTime = 30 * time.Second
	// mostStreams and mostStreamsOfOne bound the streams that are open at once, of all callers and of one. Each tab of a
	// browser has one. Other calls are not limited.
	mostStreams, mostStreamsOfOne = 64, 16
)

// A guard protects against attacks through an operator's browser: other sites' pages that send requests here (CSRF),
// that reach this daemon by a name of their own (DNS rebinding), or that show the page in a frame.
type guard struct {
	names   func() (*x509.Certificate, error) // the certificate with this daemon's names; nil: there is none
	foreign func(r *http.Request, why error)
	streams *places
	origins http.CrossOriginProtection
}

// contentPolicy lets the page load only files of this server, and forbids showing it in a frame.
const contentPolicy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"

// protect passes safe requests on to next, and bounds their bodies, times and streams.
func (g *guard) protect(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		header := w.Header()
		header.Set("Content-Security-Policy", contentPolicy)
		header.Set("X-Frame-Options", "DENY") // for browsers that do not know frame-ancestors
		header.Set("X-Content-Type-Options", "nosniff")
		header.Set("Referrer-Policy", "no-referrer")
		header.Set("Cross-Origin-Opener-Policy", "same-origin")
		header.Set("Cross-Origin-Resource-Policy", "same-origin")
		header.Set("Cache-Control", "no-store")
		if httpStatus, code, err := g.check(r); err != nil {
			if code == codes.PermissionDenied {
				g.foreign(r, err)
			}
			refuse(w, httpStatus, code, err.Error(), err.remedy)
			return
		}
		writer := &deadlineWriter{ResponseWriter: w, deadline: http.NewResponseController(w)}
		body, err := readBody(w, r)
		if err != nil {
			httpStatus := http.StatusBadRequest
			if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
				httpStatus = http.StatusRequestEntityTooLarge
			}
			refuse(w, httpStatus, codes.InvalidArgument, err.Error(),
				fmt.Sprintf("send a body of at most %d bytes, at once", bodyBytes))
			return
		}
		r.Body = body
		// Clear the server's read deadline: from now on only the end of the connection is read, which ends the request, and a
		// deadline would look like it.
		_ = writer.deadline.SetReadDeadline(time.Time{})
		if streams(r) {
			leave, ok := g.streams.take(callerOf(r))
			if !ok {
				refuse(w, http.StatusTooManyRequests, codes.ResourceExhausted,
					fmt.Sprintf("too many streams are open: at most %d in all, %d per caller",
						mostStreams, mostStreamsOfOne),
					"close other watches and pages")
				return
			}
			defer leave()
		}
		next.ServeHTTP(writer, r)
	})
}

// A refusal says why a request is refused, and what to do about it.
type refusal struct {
	error

	remedy string
}

// check says why a request is refused, and with which status; nil: it is not refused.
func (g *guard) check(r *http.Request) (httpStatus int, _ codes.Code, _ *refusal) {
	if err := g.checkHost(r.Host); err != nil {
		return http.StatusMisdirectedRequest, codes.PermissionDenied, &refusal{err,
			"use localhost, an address of this host, or a name in its certificate"}
	}
	if r.Method == http.MethodGet || r.Method == http.MethodHead {
		if err := checkFetch(r); err != nil {
			return http.StatusForbidden, codes.PermissionDenied, &refusal{err, "open the page by its own address"}
		}
		return 0, 0, nil
	}
	if err := g.origins.Check(r); err != nil {
		return http.StatusForbidden, codes.PermissionDenied, &refusal{
			fmt.Errorf("a page of another site sent this: %w", err), "send it from the page, or with curl"}
	}
	// A page can send a "simple request" of Fetch to another site without asking that first, and those are never JSON.
	if kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || kind != "application/json" {
		return http.StatusUnsupportedMediaType, codes.InvalidArgument, &refusal{
			errors.New("a request that changes something needs Content-Type application/json, even without a body"),
			"add the header: curl --header 'Content-Type: application/json'"}
	}
	return 0, 0, nil
}

// readBody reads the whole body, in the time that the server allows. GET and HEAD have none.
func readBody(w http.ResponseWriter, r *http.Request) (io.ReadCloser, error) {
	if r.Method == http.MethodGet || r.Method == http.MethodHead {
		return http.NoBody, nil
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, bodyBytes))
	if err != nil {
		return nil, fmt.Errorf("the body: %w", err)
	}
	return io.NopCloser(bytes.NewReader(body)), nil
}

// checkHost accepts names of this daemon that no other site can have. In DNS rebinding, an attacker's name resolves to
// this host, and the browser sends requests here under that name.
func (g *guard) checkHost(hostport string) error {
	host := hostport
	if h, port, err := net.SplitHostPort(hostport); err == nil {
		if _, err := strconv.ParseUint(port, 10, 16); err != nil {
			return fmt.Errorf("host %q has no port number", hostport)
		}
		host = h
	}
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	if host == "localhost" || strings.HasSuffix(host, ".localhost") {
		return nil
	}
	if _, err := netip.ParseAddr(strings.Trim(host, "[]")); err == nil {
		return nil
	}
	if g.names != nil && host != "" {
		certificate, err := g.names()
		if err != nil {
			return fmt.Errorf("the names of this daemon: %w", err)
		}
		if certificate.VerifyHostname(host) == nil {
			return nil
		}
	}
	return fmt.Errorf("this daemon is not known by the name %q", host)
}

// checkFetch refuses reads and streams for pages of other sites, which include other ports of this host. A link to the
// page is allowed, because following it changes nothing.
func checkFetch(r *http.Request) error {
	switch from := r.Header.Get("Sec-Fetch-Site"); from {
	case "", "none", "same-origin": // no browser, its address bar, or the page
		return nil
	default:
		if r.Header.Get("Sec-Fetch-Mode") == "navigate" && r.Header.Get("Sec-Fetch-Dest") == "document" {
			return nil
		}
		return fmt.Errorf("a page of another site (%s) asked for this", from)
	}
}

// streams says whether the answer to a request is a stream: see http.yaml.
func streams(r *http.Request) bool {
	return strings.HasSuffix(r.URL.Path, ":watch") || r.URL.Path == eventsPath
}

// callerOf returns the address by which callers of streams are counted; empty: the caller is at a Unix socket.
func callerOf(r *http.Request) string {
	if network := limits.NetworkOf(r.RemoteAddr); network.IsValid() {
		return network.String()
	}
	return ""
}

// deadlineWriter sets a deadline for each part of an answer, so that a stream may last without limit, but a reader that
// stops reading ends it.
type deadlineWriter struct {
	http.ResponseWriter

	deadline *http.ResponseController
}

// Write writes a part, within WriteTime.
func (w *deadlineWriter) Write(p []byte) (int, error) {
	_ = w.deadline.SetWriteDeadline(time.Now().Add(WriteTime))
	return w.ResponseWriter.Write(p)
}

// Unwrap makes http.ResponseController work.
func (w *deadlineWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }
