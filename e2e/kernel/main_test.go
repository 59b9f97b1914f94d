// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"context"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/e2e/emulator"
	"github.com/migrated-vm/migrated/pkg/testenv"
)

// patience bounds a test, not counting the build of its kernel. Nothing waits that long unless it is broken.
const patience = 5 * time.Minute

// need skips a test if a command that it runs is missing.
func need(t *testing.T, commands ...string) {
	t.Helper()
	for _, command := range commands {
		if _, err := exec.LookPath(command); err != nil {
			testenv.CannotRun(t, "%v", err)
		}
	}
}

// needQEMU skips a test if there is no QEMU to boot in.
func needQEMU(t *testing.T) {
	t.Helper()
	if _, err := emulator.Dir(t.Context(), QEMU); err != nil {
		testenv.CannotRun(t, "%v", err)
	}
}

// testContext returns a context that ends with the test's patience.
func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// eachVersion runs a test for each version, or for the one that the environment variable KERNEL names.
func eachVersion(t *testing.T, test func(*testing.T, Version)) {
	t.Helper()
	for _, version := range Versions {
		t.Run(string(version), func(t *testing.T) {
			Only(t, version)
			test(t, version)
		})
	}
}

// built returns a kernel of that version and variant.
func built(t *testing.T, version Version, v Variant) Tree {
	t.Helper()
	need(t, "gcc", "flex", "bison", "bc", "rsync")
	tree, err := Build(t.Context(), version, v)
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

// initOnly returns the path of an initramfs with nothing but testdata/init.c.
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
