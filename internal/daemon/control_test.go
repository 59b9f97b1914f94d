// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/migrated-vm/migrated/internal/config"
	"github.com/migrated-vm/migrated/internal/migration"
	"github.com/migrated-vm/migrated/pkg/testenv"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// startDaemon runs a daemon for the test and connects to its control API.
func startDaemon(t *testing.T) *grpc.ClientConn {
	t.Helper()
	cfg := config.Default()
	cfg.Listen = "127.0.0.1:0"
	_, conn := startConfigured(t, cfg)
	return conn
}

// startConfigured is startDaemon with a configuration. It replaces the socket and the log directory, and the state
// directory if that is the default.
func startConfigured(t *testing.T, cfg config.Config) (*Daemon, *grpc.ClientConn) {
	t.Helper()
	if cfg.StateDir == config.Default().StateDir {
		cfg.StateDir = filepath.Join(t.TempDir(), "state")
	}
	cfg.LogDir = filepath.Join(t.TempDir(), "log")
	cfg.Socket = filepath.Join(t.TempDir(), "control.sock")
	d, stop, ended := runDaemon(t, cfg)
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Errorf("the daemon ended with %v", err)
		}
	})
	return d, connectSocket(t, cfg.Socket)
}

// runDaemon runs a daemon until stop is called, or the test ends, and returns when it serves. ended receives what Run
// returns.
func runDaemon(t *testing.T, cfg config.Config) (d *Daemon, stop func(), ended <-chan error) {
	t.Helper()
	d, err := New(cfg, "v-test", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ready, result := make(chan struct{}), make(chan error, 1)
	d.OnReady(func() { close(ready) })
	ctx, stop := context.WithCancel(context.Background()) // t.Context ends before the cleanup of the caller
	t.Cleanup(stop)
	go func() { result <- d.Run(ctx) }()
	select {
	case <-ready:
	case err := <-result:
		t.Fatal(err)
	}
	return d, stop, result
}

// connectSocket connects to a daemon's socket.
func connectSocket(t *testing.T, socket string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
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

func TestControlRefusesBadRequests(t *testing.T) {
	client := migratedv1.NewControlServiceClient(startDaemon(t))
	good := func() *migratedv1.MigrationSpec {
		return &migratedv1.MigrationSpec{Vm: "/nowhere/qmp.sock", Destination: "127.0.0.1:1"}
	}
	for _, c := range []struct {
		name   string
		id     string
		change func(*migratedv1.MigrationSpec)
	}{
		{"relative socket", "m", func(s *migratedv1.MigrationSpec) { s.Vm = "qmp.sock" }},
		{"no socket", "m", func(s *migratedv1.MigrationSpec) { s.Vm = "" }},
		{"no port", "m", func(s *migratedv1.MigrationSpec) { s.Destination = "host" }},
		{"no host", "m", func(s *migratedv1.MigrationSpec) { s.Destination = ":7600" }},
		{"relative template", "m", func(s *migratedv1.MigrationSpec) { s.DestinationTemplate = "x/y" }},
		{"template and socket", "m", func(s *migratedv1.MigrationSpec) {
			s.DestinationTemplate, s.DestinationQmp = "/x", "/y"
		}},
		{"a bandwidth in megabytes", "m", func(s *migratedv1.MigrationSpec) { s.Bandwidth = 500 }},
		{"a label without a key", "m", func(s *migratedv1.MigrationSpec) { s.Labels = map[string]string{"": "v"} }},
		{"a limit of nothing", "m", func(s *migratedv1.MigrationSpec) { s.PrepareLimit = durationpb.New(0) }},
		{"a limit that is too long", "m", func(s *migratedv1.MigrationSpec) {
			s.TotalLimit = durationpb.New(1000 * time.Hour)
		}},
		{"an id that names a file elsewhere", "../m", func(*migratedv1.MigrationSpec) {}},
		{"an id that is too long", string(make([]byte, 65)), func(*migratedv1.MigrationSpec) {}},
	} {
		t.Run(c.name, func(t *testing.T) {
			spec := good()
			c.change(spec)
			_, err := client.Start(t.Context(), &migratedv1.StartRequest{Id: c.id, Spec: spec})
			if status.Code(err) != codes.InvalidArgument {
				t.Errorf("Start: %v", err)
			}
			_, err = client.Prepare(t.Context(), &migratedv1.PrepareRequest{Id: c.id, Spec: spec})
			if status.Code(err) != codes.InvalidArgument {
				t.Errorf("Prepare: %v", err)
			}
		})
	}
	list, err := client.List(t.Context(), &migratedv1.ListRequest{})
	if err != nil || len(list.GetMigrations()) != 0 {
		t.Errorf("refused requests left %v, %v", list, err)
	}
}

func TestUnknownMigrations(t *testing.T) {
	client := migratedv1.NewControlServiceClient(startDaemon(t))
	_, err := client.Get(t.Context(), &migratedv1.GetRequest{Id: "x"})
	if status.Code(err) != codes.NotFound {
		t.Errorf("Get: %v", err)
	}
	_, err = client.Cancel(t.Context(), &migratedv1.CancelRequest{Id: "x"})
	if status.Code(err) != codes.NotFound {
		t.Errorf("Cancel: %v", err)
	}
	_, err = client.SetBandwidth(t.Context(), &migratedv1.SetBandwidthRequest{Id: "x"})
	if status.Code(err) != codes.NotFound {
		t.Errorf("SetBandwidth: %v", err)
	}
	_, err = client.SetBandwidth(t.Context(), &migratedv1.SetBandwidthRequest{Id: "x", Bandwidth: 1})
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("SetBandwidth to next to nothing: %v", err)
	}
	_, err = client.Start(t.Context(), &migratedv1.StartRequest{Id: "x"})
	if status.Code(err) != codes.NotFound {
		t.Errorf("Start without a spec: %v", err)
	}
	stream, err := client.Watch(t.Context(), &migratedv1.WatchRequest{Id: "x"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.NotFound {
		t.Errorf("Watch: %v", err)
	}
}

// TestRepeatedStartIsOneMigration: repeated calls with the same id return the same
// migration, also after it has failed. With another spec they are refused.
func TestRepeatedStartIsOneMigration(t *testing.T) {
	client := migratedv1.NewControlServiceClient(startDaemon(t))
	spec := &migratedv1.MigrationSpec{Vm: filepath.Join(t.TempDir(), "qmp.sock"), Destination: "127.0.0.1:1"}
	for range 3 {
		answer, err := client.Start(t.Context(), &migratedv1.StartRequest{Id: "m1", Spec: spec})
		if err != nil {
			t.Fatal(err)
		}
		if answer.GetMigration().GetId() != "m1" {
			t.Errorf("id is %q", answer.GetMigration().GetId())
		}
		awaitEnd(t, client, "m1")
	}
	list, err := client.List(t.Context(), &migratedv1.ListRequest{})
	if err != nil || len(list.GetMigrations()) != 1 {
		t.Errorf("List: %v, %v", list, err)
	}
	other := &migratedv1.MigrationSpec{Vm: spec.GetVm(), Destination: "127.0.0.1:2"}
	_, err = client.Start(t.Context(), &migratedv1.StartRequest{Id: "m1", Spec: other})
	if status.Code(err) != codes.AlreadyExists {
		t.Errorf("another spec: %v", err)
	}
}

func TestMissingSocketIsNamed(t *testing.T) {
	client := migratedv1.NewControlServiceClient(startDaemon(t))
	vm := filepath.Join(t.TempDir(), "qmp.sock")
	answer, err := client.Start(t.Context(), &migratedv1.StartRequest{
		Spec: &migratedv1.MigrationSpec{Vm: vm, Destination: "127.0.0.1:1"},
	})
	if err != nil {
		t.Fatal(err)
	}
	m := awaitEnd(t, client, answer.GetMigration().GetId())
	if m.GetState() != migratedv1.MigrationState_MIGRATION_STATE_FAILED ||
		m.GetError().GetVmStatus() != "the VM was not touched" {
		t.Errorf("%v", m)
	}
}

func awaitEnd(t *testing.T, client migratedv1.ControlServiceClient, id string) *migratedv1.Migration {
	t.Helper()
	stream, err := client.Watch(t.Context(), &migratedv1.WatchRequest{Id: id})
	if err != nil {
		t.Fatal(err)
	}
	for {
		answer, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if migration.Terminal(answer.GetMigration().GetState()) {
			return answer.GetMigration()
		}
	}
}

func TestHealthAndReflection(t *testing.T) {
	conn := startDaemon(t)
	const service = "migrated.v1.ControlService"
	answer, err := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{Service: service})
	if err != nil || answer.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("health: %v, %v", answer, err)
	}
	stream, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&reflectionpb.ServerReflectionRequest{
		MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{},
	}); err != nil {
		t.Fatal(err)
	}
	listed, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range listed.GetListServicesResponse().GetService() {
		if s.GetName() == service {
			return
		}
	}
	t.Errorf("reflection does not list %s: %v", service, listed)
}

// TestSecondDaemonIsRefused: a daemon does not take the socket of another one.
func TestSecondDaemonIsRefused(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "control.sock")
	first, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer closeQuietly(first)
	cfg := config.Default()
	cfg.StateDir, cfg.Socket, cfg.Listen = filepath.Join(t.TempDir(), "state"), socket, "127.0.0.1:0"
	cfg.LogDir = filepath.Join(t.TempDir(), "log")
	d, err := New(cfg, "v-test", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Run(t.Context()); err == nil {
		t.Error("a second daemon serves the same socket")
	}
}

// TestSocketGroup: only root may use the control socket, or a group as well. The error for an unknown group names it.
func TestSocketGroup(t *testing.T) {
	if os.Geteuid() != 0 {
		testenv.CannotRun(t, "needs root, who alone gives a file to any group")
	}
	const nogroup = 65534
	for group, want := range map[string]struct {
		mode os.FileMode
		gid  uint32
	}{"": {0o600, 0}, "nogroup": {0o660, nogroup}, "65534": {0o660, nogroup}} {
		cfg := config.Default()
		cfg.Listen, cfg.SocketGroup = "127.0.0.1:0", group
		d, _ := startConfigured(t, cfg)
		info, err := os.Stat(d.cfg.Socket)
		if err != nil {
			t.Fatal(err)
		}
		if gid := info.Sys().(*syscall.Stat_t).Gid; info.Mode().Perm() != want.mode || gid != want.gid {
			t.Errorf("socket_group %q: mode %o and group %d, want %o and %d",
				group, info.Mode().Perm(), gid, want.mode, want.gid)
		}
	}
	cfg := config.Default()
	cfg.StateDir, cfg.LogDir, cfg.SocketGroup = t.TempDir(), t.TempDir(), "no-such-group"
	if _, err := New(cfg, "v-test", slog.New(slog.DiscardHandler)); err == nil ||
		!strings.Contains(err.Error(), "no-such-group") {
		t.Errorf("a group that is not there: %v", err)
	}
}
