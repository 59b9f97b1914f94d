// SPDX-License-Identifier: Apache-2.0

package selinux_test

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/migrated-vm/migrated/e2e/kernel"
	"github.com/migrated-vm/migrated/e2e/kernel/refpolicy"
	"github.com/migrated-vm/migrated/pkg/testenv"
)

// TestDaemonOnDebian: under all of Debian's policy, enforced, init starts the daemon into its domain. The daemon says
// that it is ready, finds that nothing on this host keeps it from working, and is denied nothing.
func TestDaemonOnDebian(t *testing.T) {
	modules, err := refpolicy.Modules(t.Context())
	if err != nil {
		testenv.CannotRun(t, "%v", err)
	}
	program := compileC(t, "testdata/daemon.c")
	got := boot(t, []kernel.File{
		{Name: "policy", Path: policy(t, modules...)},
		{Name: "init", Mode: 0o755, Path: program},
		{Name: "sbin/init", Mode: 0o755, Path: program},
		{Name: "usr/bin/migrated", Mode: 0o755, Path: migrated(t)},
		{Name: "etc/hosts", Data: []byte("127.0.0.1 localhost\n")},
		{Name: "var", Mode: fs.ModeDir | 0o755},
	})
	want := map[string]string{
		"init":         "system_u:system_r:init_t:s0",
		"kept":         "2", // the sockets for peers and for operators
		"notification": "READY=1",
		"daemon":       "system_u:system_r:migrated_t:s0",
		"check":        "0", // of both ends, which are the same host
		"list":         "0",
		"end":          "0",
		"output":       "serving",
	}
	if diff := cmp.Diff(want, got.results); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if len(got.denials) != 0 {
		t.Errorf("denied: %+v", got.denials)
	}
}

// migrated builds the static program.
func migrated(t *testing.T) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "migrated")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-o", out, "github.com/migrated-vm/migrated/cmd/migrated")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if said, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", cmd, err, said)
	}
	return out
}
