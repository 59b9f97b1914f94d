// SPDX-License-Identifier: Apache-2.0

// Package mtls says who may talk to whom over a network: mutual TLS 1.3, and the names in the other side's
// certificate. Certificates are read anew for each connection, so that a renewed one is used without a
// restart; there are a dozen connections in a migration.
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

// ErrStranger says that the other side's certificate is good, but has no name that is allowed.
var ErrStranger = errors.New("the certificate names nobody who is allowed")

// Files are paths of PEM files.
type Files struct {
	Certificate string // this side's, with its intermediates
	Key         string
	CA          string // those whom this side believes
}

// Check reads the files.
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

// Allow decides by the names in a verified certificate: nil, or why not.
type Allow func(names []string) error

// Server is for listeners. A client without a certificate of the authorities gets no connection; what the names in it
// allow is for the server to decide, see Names.
func (f Files) Server() credentials.TransportCredentials {
	return credentials.NewTLS(f.ServerConfig("h2"))
}

// ServerConfig is Server's, of a server that speaks one protocol (ALPN).
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
			}, nil
		},
	}
}

// Client is for connections to address, HOST:PORT, all that are made with the result: the files are read for each. The
// server's certificate has to be for that host; with allow, which may be nil, any name will do that it accepts.
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
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			certificate, _, err := f.load()
			return certificate, err
		},
		InsecureSkipVerify: true, // against authorities that were read once; what follows verifies all
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

// verify is the standard verification of a server; host may be empty, for any.
func verify(state tls.ConnectionState, pool *x509.CertPool, host string) error {
	between := x509.NewCertPool()
	for _, c := range state.PeerCertificates[1:] {
		between.AddCert(c)
	}
	_, err := state.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: pool, Intermediates: between, DNSName: host})
	return err
}

// names are the other side's: URIs, SPIFFE ids among them, DNS names and IP addresses.
func names(state tls.ConnectionState) []string {
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

// Names are those of the other side of a connection; nil where it is not encrypted.
func Names(info credentials.AuthInfo) []string {
	secure, ok := info.(credentials.TLSInfo)
	if !ok {
		return nil
	}
	return names(secure.State)
}

// NamesOf are those of the other side of a TLS connection with a verified certificate.
func NamesOf(state *tls.ConnectionState) []string { return names(*state) }

// AnyOf allows who has one of the names; nobody if there are none.
func AnyOf(allowed []string) Allow {
	return func(names []string) error {
		if slices.ContainsFunc(names, func(name string) bool { return slices.Contains(allowed, name) }) {
			return nil
		}
		return fmt.Errorf("%w: %q", ErrStranger, names)
	}
}

// Loopback says whether address, HOST:PORT, cannot be reached from another host: there TLS protects nothing.
func Loopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return false
	}
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}
