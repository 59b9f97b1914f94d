// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"net"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/internal/config"
	"github.com/migrated-vm/migrated/internal/version"
	"github.com/migrated-vm/migrated/pkg/mtls"
	"github.com/migrated-vm/migrated/pkg/mtls/mtlstest"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// secured is a daemon with TLS, and the authority that it trusts.
type secured struct {
	daemon           *Daemon
	ca               *mtlstest.Authority
	peers, operators string // addresses
}

func startSecured(t *testing.T) secured {
	t.Helper()
	cfg, ca := withTLS(t)
	cfg.ControlListen = freeAddress(t)
	cfg.Peers, cfg.Operators = []string{"a.example web-*"}, []string{"operator.example"}
	d, _ := startConfigured(t, cfg)
	return secured{d, ca, net.JoinHostPort("127.0.0.1", d.pagePort), cfg.ControlListen}
}

// withTLS returns the configuration of a daemon on loopback with TLS, and the authority that it trusts.
func withTLS(t *testing.T) (config.Config, *mtlstest.Authority) {
	t.Helper()
	ca, err := mtlstest.NewAuthority(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	files, err := ca.Issue("daemon", "127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	cfg := config.Default()
	cfg.Listen = "127.0.0.1:0"
	cfg.TLSCertificate, cfg.TLSKey, cfg.TLSCA = files.Certificate, files.Key, files.CA
	return cfg, ca
}

// freeAddress returns an address on loopback where nobody listens.
func freeAddress(t *testing.T) string {
	t.Helper()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := free.Close(); err != nil {
		t.Fatal(err)
	}
	return free.Addr().String()
}

// as connects with a certificate for name.
func (s secured) as(t *testing.T, name, address string) *grpc.ClientConn {
	t.Helper()
	files, err := s.ca.Issue("client", name)
	if err != nil {
		t.Fatal(err)
	}
	creds, err := files.Client(address, nil)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(creds))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	})
	return conn
}

func wantCode(t *testing.T, what string, err error, want codes.Code) {
	t.Helper()
	if status.Code(err) != want {
		t.Errorf("%s: %v, want %v", what, err, want)
	}
}

// TestOnlyThoseWhoAreNamed: only operators may use the control API, and only listed peers the peer protocol.
func TestOnlyThoseWhoAreNamed(t *testing.T) {
	s := startSecured(t)
	for name, want := range map[string]codes.Code{
		"operator.example": codes.OK, "a.example": codes.PermissionDenied, "stranger.example": codes.PermissionDenied,
	} {
		client := migratedv1.NewControlServiceClient(s.as(t, name, s.operators))
		_, err := client.List(t.Context(), &migratedv1.ListRequest{})
		wantCode(t, "List by "+name, err, want)
		watch, err := client.Watch(t.Context(), &migratedv1.WatchRequest{Id: "none"})
		if err == nil {
			_, err = watch.Recv()
		}
		if want == codes.OK {
			want = codes.NotFound
		}
		wantCode(t, "Watch by "+name, err, want)
	}
	for name, want := range map[string]codes.Code{
		"a.example": codes.OK, "operator.example": codes.PermissionDenied, "stranger.example": codes.PermissionDenied,
	} {
		_, err := migratedv1.NewPeerServiceClient(s.as(t, name, s.peers)).CheckHost(
			t.Context(), &migratedv1.CheckHostRequest{})
		wantCode(t, "CheckHost by "+name, err, want)
		lane, err := migratedv1.NewPageServiceClient(s.as(t, name, s.peers)).Fetch(t.Context())
		if err == nil {
			_, err = lane.Recv()
		}
		// A lane without a migration is refused to all, but to strangers for another reason.
		if known := !strings.Contains(status.Convert(err).Message(), mtls.ErrStranger.Error()); known != (want == codes.OK) ||
			err == nil {
			t.Errorf("Fetch by %s: %v", name, err)
		}
	}
}

func TestPeersSendOnlyTheirVMs(t *testing.T) {
	s := startSecured(t)
	client := migratedv1.NewPeerServiceClient(s.as(t, "a.example", s.peers))
	for vm, want := range map[string]codes.Code{"db-1": codes.PermissionDenied, "web-1": codes.FailedPrecondition} {
		_, err := client.PrepareIncoming(t.Context(), &migratedv1.PrepareIncomingRequest{
			Id: "m-" + vm, Protocol: version.Protocol, OldestProtocol: version.OldestProtocol,
			Machine: &migratedv1.SourceMachine{Name: vm},
		})
		wantCode(t, vm, err, want) // FailedPrecondition: no QEMU can be started, which comes after the permission
	}
}

// TestReload changes who may connect while the connections exist.
func TestReload(t *testing.T) {
	s := startSecured(t)
	peer := func(name string) func() error {
		client := migratedv1.NewPeerServiceClient(s.as(t, name, s.peers))
		return func() error {
			_, err := client.CheckHost(t.Context(), &migratedv1.CheckHostRequest{})
			return err
		}
	}
	operator := func(name string) func() error {
		client := migratedv1.NewControlServiceClient(s.as(t, name, s.operators))
		return func() error {
			_, err := client.List(t.Context(), &migratedv1.ListRequest{})
			return err
		}
	}
	a := peer("a.example") // it connects now, before the test issues another certificate into the same file
	wantCode(t, "listed peer", a(), codes.OK)
	b := peer("b.example")
	wantCode(t, "other peer", b(), codes.PermissionDenied)
	o := operator("operator.example")
	wantCode(t, "listed operator", o(), codes.OK)
	p := operator("other.example")
	wantCode(t, "other operator", p(), codes.PermissionDenied)
	next := s.daemon.cfg
	next.Peers, next.Operators, next.Bandwidth = []string{"b.example"}, []string{"other.example"}, "1M"
	if err := s.daemon.Reload(next); err != nil {
		t.Fatal(err)
	}
	wantCode(t, "peer that was listed", a(), codes.PermissionDenied)
	wantCode(t, "listed peer", b(), codes.OK)
	wantCode(t, "operator that was listed", o(), codes.PermissionDenied)
	wantCode(t, "listed operator", p(), codes.OK)
	if source, destination := s.daemon.sourceConfig().Bandwidth,
		s.daemon.destinationConfig("").Bandwidth; source != 1<<20 || destination != 1<<20 {
		t.Errorf("bandwidth %d of sources and %d of destinations, want 1 MiB", source, destination)
	}
	next.Operators = nil // not valid: nobody could use the control API
	if err := s.daemon.Reload(next); err == nil {
		t.Error("a wrong configuration is taken")
	}
	wantCode(t, "listed operator", p(), codes.OK)
}

func TestNoPlaintextToOtherHosts(t *testing.T) {
	for address, c := range map[string]struct {
		plaintext, ok bool
	}{
		"127.0.0.1:7600": {ok: true}, "localhost:7600": {ok: true}, "192.0.2.1:7600": {}, "host.example:7600": {},
		"192.0.2.2:7600": {plaintext: true, ok: true},
	} {
		d := &Daemon{cfg: config.Config{Plaintext: c.plaintext}}
		conn, err := d.dial(address)
		if (err == nil) != c.ok {
			t.Errorf("%s: %v", address, err)
		}
		if err == nil {
			_ = conn.Close()
		}
	}
	d := &Daemon{cfg: config.Config{TLSCertificate: "/nowhere", TLSKey: "/nowhere", TLSCA: "/nowhere"}}
	if _, err := d.dial("127.0.0.1:7600"); err == nil {
		t.Error("a connection without the certificate that is set")
	}
}
