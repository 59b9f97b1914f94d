// SPDX-License-Identifier: Apache-2.0

package pki

import (
	"context"
	"crypto/x509"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/migrated-vm/migrated/pkg/mtls"
)

func authority(t *testing.T) (*Authority, string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "pki")
	a, err := Create(dir, "site", 3650)
	if err != nil {
		t.Fatal(err)
	}
	return a, dir
}

func issue(t *testing.T, a *Authority, r Request) (mtls.Files, *x509.Certificate) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), r.Name)
	if r.Days == 0 {
		r.Days = 30
	}
	c, err := a.Issue(dir, r)
	if err != nil {
		t.Fatal(err)
	}
	return FilesIn(dir), c
}

func mode(t *testing.T, path string) os.FileMode {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Mode().Perm()
}

// TestFiles: only the owner may read keys, and no file is overwritten.
func TestFiles(t *testing.T) {
	a, dir := authority(t)
	files, _ := issue(t, a, Request{Name: "host-a"})
	for path, want := range map[string]os.FileMode{
		filepath.Join(dir, caKeyFile): 0o600, filepath.Join(dir, caFile): 0o644,
		files.Key: 0o600, files.Certificate: 0o644, files.CA: 0o644, filepath.Dir(files.Key): 0o700,
	} {
		if got := mode(t, path); got != want {
			t.Errorf("%s has mode %o, want %o", path, got, want)
		}
	}
	if err := files.Check(); err != nil {
		t.Error(err)
	}
	before, err := os.ReadFile(filepath.Join(dir, caKeyFile))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Create(dir, "another", 10); !errors.Is(err, ErrExists) {
		t.Errorf("a second authority in the same place: %v", err)
	}
	if after, err := os.ReadFile(filepath.Join(dir, caKeyFile)); err != nil || !cmp.Equal(before, after) {
		t.Errorf("the authority's key has changed (%v)", err)
	}
	for _, only := range []string{files.Key, files.Certificate, files.CA} {
		there := t.TempDir()
		if err := os.WriteFile(filepath.Join(there, filepath.Base(only)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := a.Issue(there, Request{Name: "host-a", Days: 1}); !errors.Is(err, ErrExists) {
			t.Errorf("issued over %s: %v", only, err)
		}
		if entries, err := os.ReadDir(there); err != nil || len(entries) != 1 {
			t.Errorf("refused, and %d files are there (%v)", len(entries), err)
		}
	}
}

// TestDaemonsBelieveEachOther: two hosts with certificates connect by name and by address. A client's certificate is
// accepted from a client, and not from a server.
func TestDaemonsBelieveEachOther(t *testing.T) {
	a, _ := authority(t)
	other, _ := authority(t)
	addresses := []string{"127.0.0.1", "::1", "host-a.example"}
	host, certificate := issue(t, a, Request{Name: "localhost", Addresses: addresses})
	if diff := cmp.Diff([]string{"localhost", "host-a.example", "127.0.0.1", "::1"}, Names(certificate)); diff != "" {
		t.Errorf("names (-want +got):\n%s", diff)
	}
	named, _ := issue(t, a, Request{Name: "host-b"})
	client, _ := issue(t, a, Request{Name: "alice", Client: true})
	stranger, _ := issue(t, other, Request{Name: "host-b"})
	stranger.CA = host.CA
	posing, _ := issue(t, a, Request{Name: "localhost", Addresses: []string{"127.0.0.1"}, Client: true})
	for name, c := range map[string]struct {
		server, client mtls.Files
		ok             bool
	}{
		"a host":                  {host, named, true},
		"an operator":             {host, client, true},
		"of another authority":    {host, stranger, false},
		"an operator as the host": {posing, named, false},
		"another host than meant": {named, host, false},
	} {
		if err := call(t, c.server, c.client); (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// call has a client call a server at 127.0.0.1.
func call(t *testing.T, server, client mtls.Files) error {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(grpc.Creds(server.Server()))
	healthpb.RegisterHealthServer(s, health.NewServer())
	go func() { _ = s.Serve(listener) }()
	defer s.Stop()
	creds, err := client.Client(listener.Addr().String(), nil)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient("passthrough:///"+listener.Addr().String(), grpc.WithTransportCredentials(creds))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, err = healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
	return err
}

// TestRenew: the names and the key stay, and only one file changes.
func TestRenew(t *testing.T) {
	a, dir := authority(t)
	files, old := issue(t, a, Request{Name: "host-a", Addresses: []string{"192.0.2.1"}, Days: 3})
	key, err := os.ReadFile(files.Key)
	if err != nil {
		t.Fatal(err)
	}
	if a, err = Open(dir); err != nil {
		t.Fatal(err)
	}
	renewed, err := a.Renew(filepath.Dir(files.Key), 100)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(Names(old), Names(renewed)); diff != "" {
		t.Errorf("names (-old +new):\n%s", diff)
	}
	if !renewed.NotAfter.After(old.NotAfter) || renewed.SerialNumber.Cmp(old.SerialNumber) == 0 {
		t.Errorf("it is valid until %v, with number %v", renewed.NotAfter, renewed.SerialNumber)
	}
	if err := files.Check(); err != nil {
		t.Error(err)
	}
	if now, err := os.ReadFile(files.Key); err != nil || !cmp.Equal(key, now) {
		t.Errorf("the key has changed (%v)", err)
	}
	if entries, err := os.ReadDir(filepath.Dir(files.Key)); err != nil || len(entries) != 3 {
		t.Errorf("%d files are there (%v)", len(entries), err)
	}
	other, _ := authority(t)
	_, err = other.Renew(filepath.Dir(files.Key), 100)
	if err == nil || !strings.Contains(err.Error(), "not of this authority") {
		t.Errorf("another authority renews it: %v", err)
	}
}

func TestRefusals(t *testing.T) {
	short, err := Create(filepath.Join(t.TempDir(), "pki"), "short", 30)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		request Request
		want    string
	}{
		"no time":             {Request{Name: "host-a"}, "must be 1 to 825"},
		"too long":            {Request{Name: "host-a", Days: 826}, "must be 1 to 825"},
		"longer than its own": {Request{Name: "host-a", Days: 31}, "the authority itself expires on"},
		"a wildcard": {
			Request{Name: "host-a", Days: 1, Addresses: []string{"*.example"}}, `"*.example" is neither a DNS name`,
		},
		"a port": {
			Request{Name: "host-a", Days: 1, Addresses: []string{"192.0.2.1:7600"}}, `"192.0.2.1:7600" is neither`,
		},
	} {
		dir := filepath.Join(t.TempDir(), "out")
		if _, err := short.Issue(dir, c.request); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := os.Stat(dir); err == nil {
			t.Errorf("%s: refused, and its directory is there", name)
		}
	}
	for _, days := range []int{0, -1, MostAuthorityDays + 1} {
		if _, err := Create(t.TempDir(), "ca", days); err == nil {
			t.Errorf("an authority for %d days", days)
		}
	}
	for name, ok := range map[string]bool{
		"host-a": true, "a.example.com": true,
		"../x": false, "a/b": false, "": false, "-a": false, "192.0.2.1": false, "a..b": false,
	} {
		if err := CheckName(name); (err == nil) != ok {
			t.Errorf("name %q: %v", name, err)
		}
	}
}

// TestOpen: a key and a certificate that do not belong together, or are not an authority's, are refused.
func TestOpen(t *testing.T) {
	a, dir := authority(t)
	_, elsewhere := authority(t)
	text, err := os.ReadFile(filepath.Join(elsewhere, caKeyFile))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, caKeyFile), text, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir); err == nil || !strings.Contains(err.Error(), "not that of the authority") {
		t.Errorf("another's key: %v", err)
	}
	files, _ := issue(t, a, Request{Name: "host-a"})
	if err := os.Rename(files.Certificate, filepath.Join(dir, caFile)); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(files.Key, filepath.Join(dir, caKeyFile)); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir); err == nil {
		t.Error("a host's certificate is taken for an authority's")
	}
}
