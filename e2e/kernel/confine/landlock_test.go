// SPDX-License-Identifier: Apache-2.0

// Package confine shows in a booted kernel why package internal/confine does not use Landlock.
package confine

import (
	"context"
	"io/fs"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/migrated-vm/migrated/e2e/kernel"
	"github.com/migrated-vm/migrated/pkg/testenv"
)

// patience bounds the boot. Nothing waits that long unless it is broken.
const patience = 5 * time.Minute

// TestLandlockForbidsTracing: in any Landlock domain, whatever it restricts, root can do nothing of what the daemon
// does to a QEMU outside the domain. It could to a QEMU inside, but that QEMU would inherit the domain.
func TestLandlockForbidsTracing(t *testing.T) {
	want := map[string]string{}
	for _, name := range []string{"free", "files", "network", "inside"} {
		for what, refusal := range map[string]string{"trace": "EPERM", "getfd": "EPERM", "maps": "EACCES", "open": "EACCES"} {
			want[name+"-"+what] = "ok"
			if name == "files" || name == "network" {
				want[name+"-"+what] = refusal
			}
		}
	}
	kernel.Only(t, kernel.Linux612)
	tree, err := kernel.Build(t.Context(), kernel.Linux612, kernel.Stock)
	if err != nil {
		testenv.CannotRun(t, "%v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	initrd, err := kernel.Guest(ctx, t.TempDir(),
		kernel.File{Name: "proc", Mode: fs.ModeDir | 0o555}, kernel.File{Name: "dev", Mode: fs.ModeDir | 0o755})
	if err != nil {
		t.Fatal(err)
	}
	o := kernel.Options{Kernel: tree.BzImage, Initrd: initrd, CommandLine: "lsm=landlock loglevel=5"}
	got, err := kernel.Results(ctx, o, func(line string) { t.Log(line) })
	if err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
