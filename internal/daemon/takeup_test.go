// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/internal/config"
	"github.com/migrated-vm/migrated/internal/migration"
	"github.com/migrated-vm/migrated/internal/version"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// newerFile writes a file as a daemon of the next version would leave it.
func newerFile(t *testing.T, path ...string) (name string, content string) {
	t.Helper()
	name, content = filepath.Join(path...), fmt.Sprintf(`{"version":%d}`, version.State+1)
	if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, []byte(content), 0o600)); err != nil {
		t.Fatal(err)
	}
	return name, content
}

func isUntouched(t *testing.T, name, content string) {
	t.Helper()
	if got, err := os.ReadFile(name); err != nil || string(got) != content {
		t.Errorf("%s is %q: %v", name, got, err)
	}
}

// TestNewerHandOver: a daemon does not serve if it cannot read the record of a hand-over, whose VM may run elsewhere.
func TestNewerHandOver(t *testing.T) {
	cfg := config.Default()
	cfg.Listen, cfg.StateDir, cfg.Socket = "127.0.0.1:0", t.TempDir(), filepath.Join(t.TempDir(), "control.sock")
	cfg.LogDir = t.TempDir()
	name, content := newerFile(t, cfg.StateDir, "handed-over", "m1.json")
	d, err := New(cfg, "v-test", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	d.OnReady(func() { t.Error("it serves") })
	err = d.Run(t.Context())
	var unknown *version.Error
	if !errors.As(err, &unknown) || migration.Remedy(err) == "" {
		t.Errorf("%v; %s", err, migration.Remedy(err))
	}
	isUntouched(t, name, content)
}

// TestNewerIncoming: the source of a migration that this daemon cannot take up receives an error after which it asks
// again, and not NotFound, after which it would not.
func TestNewerIncoming(t *testing.T) {
	cfg := config.Default()
	cfg.Listen, cfg.StateDir = "127.0.0.1:0", t.TempDir()
	cfg.LogDir = t.TempDir()
	name, content := newerFile(t, cfg.StateDir, "incoming", "m1", "migration.json")
	d, _ := startConfigured(t, cfg)
	conn, err := grpc.NewClient(net.JoinHostPort("127.0.0.1", d.pagePort),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	peer := migratedv1.NewPeerServiceClient(conn)
	for id, want := range map[string]codes.Code{"m1": codes.Unknown, "m2": codes.NotFound} {
		_, err := peer.Run(t.Context(), &migratedv1.RunRequest{Id: id})
		st := status.Convert(err)
		if st.Code() != want || want == codes.Unknown && len(st.Details()) == 0 {
			t.Errorf("Run of %s: %v, want %v", id, err, want)
		}
	}
	isUntouched(t, name, content)
}

// TestDamagedFilesAreNamed: the list shows migrations with damaged files, and the daemon serves.
func TestDamagedFilesAreNamed(t *testing.T) {
	cfg := config.Default()
	cfg.Listen, cfg.StateDir = "127.0.0.1:0", t.TempDir()
	cfg.LogDir = t.TempDir()
	files := map[string]string{ // path to content
		filepath.Join(cfg.StateDir, "handed-over", "away.json"):           `{"id":"aw`,
		filepath.Join(cfg.StateDir, "handed-over", "spec.json"):           `{"version":1,"id":"spec","protocol":2,"spec":7}`,
		filepath.Join(cfg.StateDir, "incoming", "here", "migration.json"): `{"version":1,"requ`,
		filepath.Join(cfg.StateDir, "incoming", "states", "migration.json"): `{"version":1,` +
			`"request":{"id":"states","protocol":2}}`,
	}
	orphans := []string{"gone.commit", "gone.json.77.tmp"}
	for _, name := range orphans {
		files[filepath.Join(cfg.StateDir, "handed-over", name)] = "{}"
	}
	for name, content := range files {
		if err := errors.Join(
			os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, []byte(content), 0o600),
		); err != nil {
			t.Fatal(err)
		}
	}
	d, conn := startConfigured(t, cfg)
	client := migratedv1.NewControlServiceClient(conn)
	answer, err := client.List(t.Context(), &migratedv1.ListRequest{})
	if err != nil {
		t.Fatal(err)
	}
	named := map[string]bool{}
	for _, m := range answer.GetMigrations() {
		named[m.GetId()] = m.GetState() == migratedv1.MigrationState_MIGRATION_STATE_FAILED &&
			m.GetLocation() == migratedv1.Location_LOCATION_UNKNOWN &&
			m.GetError().GetReason() == migratedv1.Reason_REASON_STATE_UNREADABLE
	}
	for _, id := range []string{"away", "spec", "here", "states"} {
		if !named[id] {
			t.Errorf("%s is not named: %v", id, answer)
		}
	}
	for _, name := range orphans {
		if _, err := os.Lstat(filepath.Join(d.cfg.StateDir, "handed-over", name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", name, err)
		}
	}
	_, err = client.Prepare(t.Context(), &migratedv1.PrepareRequest{
		Id: "away", Spec: &migratedv1.MigrationSpec{Vm: "/q", Destination: "192.0.2.1:1"},
	})
	if status.Code(err) != codes.AlreadyExists {
		t.Errorf("another one of that id: %v", err)
	}
}
