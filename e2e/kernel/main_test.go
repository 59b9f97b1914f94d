// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"context"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/e2e/emulator"
	"github.com/migrated-vm/migrated/internal/cannot"
)

// patience bounds a test, not counting the build of its kernel. Nothing waits
// that long unless it is broken.
const patience = 5 * time.Minute

// need skips a test where a command is missing that it runs.
func need(t *testing.T, commands ...string) {
	t.Helper()
	for _, command := range commands {
		if _, err := exec.LookPath(command); err != nil {
			cannot.Run(t, "%v", err)
		}
	}
}

// needQEMU skips a test where there is no QEMU to boot in.
func needQEMU(t *testing.T) {
	t.Helper()
	if _, err := emulator.Dir(t.Context(), QEMU); err != nil {
		cannot.Run(t, "%v", err)
	}
}

// testContext ends with the test's patience.
func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// built is a kernel of that variant.
func built(t *testing.T, v Variant) Tree {
	t.Helper()
	need(t, "gcc", "flex", "bison", "bc", "rsync")
	tree, err := Build(t.Context(), v)
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

// initOnly is an initramfs with nothing but testdata/init.c.
func initOnly(t *testing.T) string {
	t.Helper()
	need(t, "gcc")
	dir := t.TempDir()
	init := filepath.Join(dir, "init")
	if err := CompileC(testContext(t), "testdata", init, "init.c"); err != nil {
		t.Fatal(err)
	}
	initrd, err := Initramfs(dir, []File{{Name: "init", Path: init}})
	if err != nil {
		t.Fatal(err)
	}
	return initrd
}
