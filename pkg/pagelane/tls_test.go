// SPDX-License-Identifier: Apache-2.0

package pagelane

import (
	"crypto/tls"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/pkg/pagelane/tcpkeepalive"
)

// TestHalfClosedByTLS: if the peer sends close_notify (it will send nothing more) without closing the connection, Recv
// returns codes.Unavailable.
func TestHalfClosedByTLS(t *testing.T) {
	err := <-clientOf(t, secure(t), tcpkeepalive.Quiet, takeOne, func(p *rawPeer) {
		p.must(writeHeaders(p.Framer, false, acceptance...))
		p.must(p.Conn.(*tls.Conn).CloseWrite())
	})
	if status.Code(err) != codes.Unavailable {
		t.Errorf("the client says %v", err)
	}
}

// TestOtherTLS: with TLS 1.2, or if tls.Conn has other fields than records.go knows, tls.Conn reads and writes without
// it.
func TestOtherTLS(t *testing.T) {
	for name, c := range map[string]struct {
		version uint16
		known   bool
	}{"TLS 1.2": {tls.VersionTLS12, true}, "another Go": {tls.VersionTLS13, false}} {
		t.Run(name, func(t *testing.T) {
			defer func(known bool) { fieldsKnown = known }(fieldsKnown)
			fieldsKnown = c.known
			files := issue(t, t.TempDir())
			certificate, err := tls.LoadX509KeyPair(files.Certificate, files.Key)
			if err != nil {
				t.Fatal(err)
			}
			server := credentials.NewTLS(&tls.Config{MaxVersion: c.version, Certificates: []tls.Certificate{certificate}})
			client := credentials.NewTLS(&tls.Config{InsecureSkipVerify: true})
			address, _ := serve(t, server, true, func(s *Stream) error { return echo(s) })
			conversation(t, func(how string) (clientStream, func() error, error) {
				l, err := open(t, address, client, metadata.Pairs("how", how))
				if err != nil {
					return nil, nil, err
				}
				return l, l.CloseSend, nil
			})
		})
	}
}

// TestCertificateRenewed: an open lane is not affected when the certificates are replaced. The next lane uses the new
// ones.
func TestCertificateRenewed(t *testing.T) {
	dir := t.TempDir()
	files := issue(t, dir)
	client, err := files.Client("127.0.0.1:0", nil)
	if err != nil {
		t.Fatal(err)
	}
	address, _ := serve(t, files.Server(), true, func(s *Stream) error { return echo(s) })
	first, err := open(t, address, client, nil)
	if err != nil {
		t.Fatal(err)
	}
	fetch(t, first, 1, 512<<10)
	issue(t, dir) // of another authority: neither end trusts the certificates of before
	second, err := open(t, address, client, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i, l := range []*Client{first, second, first} {
		fetch(t, l, uint64(i), 512<<10)
		fetch(t, l, uint64(i), 4096)
	}
}
