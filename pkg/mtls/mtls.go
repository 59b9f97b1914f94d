// SPDX-License-Identifier: Apache-2.0

// Package mtls decides which peers may connect over a network. It uses mutual TLS 1.3, and checks the names in
// the peer's certificate. It reads the certificates for each connection, so that a renewed one is used without a
// restart. A migration has only a dozen connections.
package mtls

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"

	"google.golang.org/grpc/credentials"
)

// ErrStranger says that the peer's certificate is valid, but has no allowed name.
var ErrStranger = errors.New("no name in the certificate is allowed")

// Files are paths of PEM files.
type Files struct {
	Certificate string // of this side, with its intermediates
	Key         string
	CA          string // the authorities that this side trusts
}

// Check reads the files. The error says which cannot be used.
func (f Files) Check() error {
	_, _, err := f.load()
	return err
}

func (f Files) load() (*tls.Certificate, *x509.CertPool, error) {
	certificate, err := tls.LoadX509KeyPair(f.Certificate, f.Key)
	if err != nil {
		return nil, nil, fmt.Errorf("TLS certificate %s and key %s: %w", f.Certificate, f.Key, err)
	}
	text, err := os.ReadFile(f.CA)
	if err != nil {
		return nil, nil, fmt.Errorf("TLS certificate authorities: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return nil, nil, fmt.Errorf("TLS certificate authorities: %s has no PEM certificate", f.CA)
	}
	return &certificate, pool, nil
}

// Allow decides by the names in a verified certificate. It returns nil, or an error that says why not.
type Allow func(names []string) error

// Server returns the credentials of a gRPC server. A client without a certificate of the authorities gets no
// connection. The server itself decides what the names in that certificate allow, see Names.
func (f Files) Server() credentials.TransportCredentials {
	return credentials.NewTLS(f.ServerConfig("h2"))
}

// ServerConfig returns the configuration of Server, for a server with one protocol (ALPN).
func (f Files) ServerConfig(protocol string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{protocol},
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			certificate, pool, err := f.load()
			if err != nil {
				return nil, err
			}
			return &tls.Config{
				MinVersion: tls.VersionTLS13, NextProtos: []string{protocol},
				Certificates: []tls.Certificate{*certificate},
				ClientAuth:   tls.RequireAndVerifyClientCert, ClientCAs: pool,
				DynamicRecordSizingDisabled: true,
			}, nil
		},
	}
}

// Client returns the credentials for connections to address, HOST:PORT. The files are read for each connection. If
// allow is nil, the server's certificate must be for that host; otherwise it must have names that allow accepts.
func (f Files) Client(address string, allow Allow) (credentials.TransportCredentials, error) {
	if err := f.Check(); err != nil {
		return nil, err
	}
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	return credentials.NewTLS(&tls.Config{
		MinVersion: tls.VersionTLS13, ServerName: host,
		// Otherwise the first 128 KiB go in records of one packet each, and each record wakes the receiver.
		DynamicRecordSizingDisabled: true,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			certificate, _, err := f.load()
			return certificate, err
		},
		InsecureSkipVerify: true, // its authorities would be read only once; VerifyConnection verifies all
		VerifyConnection: func(state tls.ConnectionState) error {
			_, pool, err := f.load()
			if err != nil {
				return err
			}
			if allow == nil {
				return verify(state, pool, host)
			}
			if err := verify(state, pool, ""); err != nil {
				return err
			}
			return allow(names(state))
		},
	}), nil
}

// verify verifies a server's certificate as crypto/tls does. An empty host accepts any name.
func verify(state tls.ConnectionState, pool *x509.CertPool, host string) error {
	between := x509.NewCertPool()
	for _, c := range state.PeerCertificates[1:] {
		between.AddCert(c)
	}
	_, err := state.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: pool, Intermediates: between, DNSName: host})
	return err
}

// names returns the names in the peer's certificate: URIs (SPIFFE ids, too), DNS names and IP addresses.
func names(state tls.ConnectionState) []string {
	if len(state.PeerCertificates) == 0 {
		return nil
	}
	certificate := state.PeerCertificates[0]
	var all []string
	for _, uri := range certificate.URIs {
		all = append(all, uri.String())
	}
	all = append(all, certificate.DNSNames...)
	for _, ip := range certificate.IPAddresses {
		all = append(all, ip.String())
	}
	return all
}

// Names returns the names in the peer's certificate, or nil if the connection is not encrypted or the peer showed none.
func Names(info credentials.AuthInfo) []string {
	secure, ok := info.(credentials.TLSInfo)
	if !ok {
		return nil
	}
	return names(secure.State)
}

// NamesOf returns the names in the peer's certificate, for a TLS connection with a verified certificate.
func NamesOf(state *tls.ConnectionState) []string { return names(*state) }

// AnyOf returns an Allow that accepts a peer with at least one of the allowed names. If allowed is empty, it accepts
// none.
func AnyOf(allowed []string) Allow {
	return func(names []string) error {
		if slices.ContainsFunc(names, func(name string) bool { return slices.Contains(allowed, name) }) {
			return nil
		}
		return fmt.Errorf("%w: %q", ErrStranger, names)
	}
}

// Loopback reports whether address, HOST:PORT, cannot be reached from another host. TLS protects nothing there.
func Loopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return false
	}
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}
