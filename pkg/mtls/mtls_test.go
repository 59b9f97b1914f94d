// SPDX-License-Identifier: Apache-2.0

package mtls_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/migrated-vm/migrated/pkg/mtls"
	"github.com/migrated-vm/migrated/pkg/mtls/mtlstest"
)

const hostA, hostB = "spiffe://example/host/a", "spiffe://example/host/b"

func authority(t *testing.T) *mtlstest.Authority {
	t.Helper()
	a, err := mtlstest.NewAuthority(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func issue(t *testing.T, a *mtlstest.Authority, file string, names ...string) mtls.Files {
	t.Helper()
	files, err := a.Issue(file, names...)
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// serve serves health checks and returns the address.
func serve(t *testing.T, creds credentials.TransportCredentials) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(grpc.Creds(creds))
	healthpb.RegisterHealthServer(server, health.NewServer())
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(server.Stop)
	return listener.Addr().String()
}

// call makes one call over one connection.
func call(t *testing.T, address string, creds credentials.TransportCredentials) error {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(creds))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	_, err = healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
	return err
}

func TestWhoGetsIn(t *testing.T) {
	ours, theirs := authority(t), authority(t)
	server := issue(t, ours, "server", hostB, "127.0.0.1")
	address := serve(t, server.Server())
	stranger := issue(t, theirs, "stranger", hostA)
	stranger.CA = server.CA
	for name, c := range map[string]struct {
		files mtls.Files
		allow mtls.Allow
		ok    bool
	}{
		"by host name":         {files: issue(t, ours, "a", hostA), ok: true},
		"by the server's name": {files: issue(t, ours, "a", hostA), allow: mtls.AnyOf([]string{hostB}), ok: true},
		"another server was meant": {
			files: issue(t, ours, "a", hostA), allow: mtls.AnyOf([]string{"spiffe://example/host/c"}),
		},
		"a certificate of another issuer": {files: stranger},
		"a server of another issuer":      {files: issue(t, theirs, "a", hostA), allow: mtls.AnyOf([]string{hostB})},
	} {
		t.Run(name, func(t *testing.T) {
			creds, err := c.files.Client(address, c.allow)
			if err != nil {
				t.Fatal(err)
			}
			if err := call(t, address, creds); (err == nil) != c.ok {
				t.Errorf("call: %v", err)
			}
		})
	}
	t.Run("no certificate", func(t *testing.T) {
		creds := credentials.NewTLS(&tls.Config{InsecureSkipVerify: true}) //nolint:gosec // it is the server that is tested
		if err := call(t, address, creds); err == nil {
			t.Error("a client without a certificate gets in")
		}
	})
	t.Run("no encryption", func(t *testing.T) {
		if err := call(t, address, insecure.NewCredentials()); err == nil {
			t.Error("a client without TLS gets in")
		}
	})
}

// TestServerOfAnotherHost connects to a server whose certificate is for another host.
func TestServerOfAnotherHost(t *testing.T) {
	ca := authority(t)
	address := serve(t, issue(t, ca, "server", "elsewhere.example").Server())
	creds, err := issue(t, ca, "a", hostA).Client(address, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := call(t, address, creds); err == nil {
		t.Error("a server of another name is believed")
	}
}

// TestRenewedCertificate checks that a renewed certificate is used without a restart.
func TestRenewedCertificate(t *testing.T) {
	ca := authority(t)
	server := issue(t, ca, "server", hostB)
	address := serve(t, server.Server())
	client := issue(t, ca, "a", hostA)
	wants := func(name string) error {
		creds, err := client.Client(address, mtls.AnyOf([]string{name}))
		if err != nil {
			t.Fatal(err)
		}
		return call(t, address, creds)
	}
	if err := wants(hostB); err != nil {
		t.Fatal(err)
	}
	issue(t, ca, "server", "spiffe://example/host/renamed")
	if err := wants("spiffe://example/host/renamed"); err != nil {
		t.Errorf("the new certificate is not used: %v", err)
	}
}

// records counts the writes to a connection: tls.Conn makes one for each record.
type records struct {
	net.Conn
	written int
}

func (r *records) Write(p []byte) (int, error) {
	r.written++
	return r.Conn.Write(p)
}

// TestFullRecords checks that both sides write full records from the first byte on.
func TestFullRecords(t *testing.T) {
	files := issue(t, authority(t), "host", "127.0.0.1")
	client, err := files.Client("127.0.0.1:0", nil)
	if err != nil {
		t.Fatal(err)
	}
	here, there := net.Pipe()
	ends := []*records{{Conn: here}, {Conn: there}}
	conns := make([]net.Conn, 2)
	accepted := make(chan error, 1)
	go func() {
		var err error
		conns[0], _, err = files.Server().ServerHandshake(ends[0])
		accepted <- err
	}()
	if conns[1], _, err = client.ClientHandshake(t.Context(), "127.0.0.1:0", ends[1]); err != nil {
		t.Fatal(err)
	}
	if err := <-accepted; err != nil {
		t.Fatal(err)
	}
	for i, name := range []string{"server", "client"} {
		before := ends[i].written
		go func() { _, _ = io.CopyN(io.Discard, conns[1-i], 16<<10) }()
		if _, err := conns[i].Write(make([]byte, 16<<10)); err != nil {
			t.Fatal(err)
		}
		if n := ends[i].written - before; n != 1 {
			t.Errorf("the %s writes 16 KiB in %d records", name, n)
		}
	}
}

func TestFilesThatCannotBeUsed(t *testing.T) {
	ca := authority(t)
	good := issue(t, ca, "a", hostA)
	if err := good.Check(); err != nil {
		t.Fatal(err)
	}
	other := issue(t, ca, "b", hostB)
	empty := good
	empty.CA = good.Key
	for name, bad := range map[string]mtls.Files{
		"no file":          {Certificate: "/nowhere.pem", Key: good.Key, CA: good.CA},
		"another's key":    {Certificate: good.Certificate, Key: other.Key, CA: good.CA},
		"no authority":     {Certificate: good.Certificate, Key: good.Key, CA: "/nowhere.pem"},
		"a key as the CAs": empty,
	} {
		if err := bad.Check(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if _, err := os.Stat(good.Certificate); err != nil {
		t.Error(err)
	}
}

func TestPeers(t *testing.T) {
	var peers mtls.Peers
	for _, text := range []string{hostA + " web-* db-?", hostB} {
		p, err := mtls.ParsePeer(text)
		if err != nil {
			t.Fatal(err)
		}
		peers = append(peers, p)
	}
	for _, c := range []struct {
		name, vm string
		ok       bool
	}{
		{hostA, "web-1", true}, {hostA, "db-1", true}, {hostA, "db-10", false}, {hostA, "", false},
		{hostB, "anything", true}, {"spiffe://example/host/c", "web-1", false},
	} {
		if err := peers.MaySend([]string{c.name}, c.vm); (err == nil) != c.ok ||
			err != nil && !errors.Is(err, mtls.ErrStranger) {
			t.Errorf("%s may send %q: %v", c.name, c.vm, err)
		}
	}
	if err := peers.MaySend(nil, "web-1"); !errors.Is(err, mtls.ErrStranger) {
		t.Errorf("nobody may send a VM: %v", err)
	}
	if err := (mtls.Peers{}).MaySend(nil, "web-1"); err != nil {
		t.Errorf("without a list: %v", err)
	}
	for _, bad := range []string{"", "  ", hostA + " [a"} {
		if p, err := mtls.ParsePeer(bad); err == nil {
			t.Errorf("%q is taken for %v", bad, p)
		}
	}
}
