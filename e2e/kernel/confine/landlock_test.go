// SPDX-License-Identifier: Apache-2.0

// Package confine shows in a booted kernel why package internal/confine does without Landlock.
package confine

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/migrated-vm/migrated/e2e/kernel"
	"github.com/migrated-vm/migrated/internal/cannot"
)

// patience bounds the boot. Nothing waits that long unless it is broken.
const patience = 5 * time.Minute

// TestLandlockForbidsTracing: root in a Landlock domain, whatever that domain is about, can do nothing of what the
// daemon does to a QEMU that is outside. It could to one inside, and that QEMU would inherit the domain.
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
	tree, err := kernel.Build(t.Context(), kernel.Stock)
	if err != nil {
		cannot.Run(t, "%v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	got := map[string]string{}
	done := false
	err = kernel.Boot(ctx, kernel.Options{
		Kernel: tree.BzImage, Initrd: initramfs(t), CommandLine: "lsm=landlock loglevel=5",
	}, func(line string) error {
		t.Log(line)
		words := strings.Fields(line)
		switch {
		case len(words) == 3 && words[0] == "RESULT":
			got[words[1]] = words[2]
		case line == "DONE":
			done = true
		}
		return nil
	})
	if err != nil || !done {
		t.Errorf("the guest did not come to its end: %v", err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func initramfs(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	program := filepath.Join(dir, "init")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-ldflags=-s -w", "-o", program, "./guest")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if said, err := cmd.CombinedOutput(); err != nil {
		t.Fatal(fmt.Errorf("%v: %w\n%s", cmd, err, said))
	}
	path, err := kernel.Initramfs(dir, []kernel.File{
		{Name: "init", Path: program, Mode: 0o755},
		{Name: "proc", Mode: fs.ModeDir | 0o555},
		{Name: "dev", Mode: fs.ModeDir | 0o755},
	})
	if err != nil {
		t.Fatal(err)
	}
	return path
}
