// SPDX-License-Identifier: Apache-2.0

// Package kernel builds and boots the kernels of kernel/ for tests: Build makes a kernel, CompileC and Initramfs make
// what runs in it, and Boot runs it under QEMU and reads its console.
package kernel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/migrated-vm/migrated/e2e/checkout"
)

// Version is a version of Linux that kernel/build knows.
type Version string

// The versions: the long-term one for which the series was first made, and the one for which it is to be sent.
const (
	Linux612 Version = "6.12"
	Linux73  Version = "7.3"
)

// Versions are all versions.
var Versions = []Version{Linux612, Linux73}

// Only skips a test of one version if the environment variable KERNEL asks for another.
func Only(t testing.TB, version Version) {
	t.Helper()
	only := Version(os.Getenv("KERNEL"))
	if only != "" && !slices.Contains(Versions, only) {
		t.Fatalf("KERNEL=%s is none of %v", only, Versions)
	}
	if only != "" && only != version {
		t.Skipf("KERNEL=%s asks for another version", only)
	}
}

// Variant is one of the kernels that kernel/build makes of a version.
type Variant string

// The variants. Those of a version have the same source and, except for Debug, the same configuration.
const (
	Stock   Variant = "stock"   // as Debian has it
	Patched Variant = "patched" // with the series
	Debug   Variant = "debug"   // with the series and all options that find mistakes
)

// Tree is a built kernel.
type Tree struct {
	BzImage   string // what QEMU boots
	Config    string // its configuration
	Include   string // its exported headers, for gcc -isystem
	Selftests string // the kernel's own tests that the series changes; Stock has none
}

// Build builds a kernel unless it has been built. That takes minutes: 'make -C kernel build' does it before go test
// counts its time.
func Build(ctx context.Context, version Version, v Variant) (Tree, error) {
	return build(ctx, string(version), string(v))
}

// build runs kernel/build with args.
func build(ctx context.Context, args ...string) (Tree, error) {
	root, err := checkout.Root()
	if err != nil {
		return Tree{}, err
	}
	cmd := exec.CommandContext(ctx, filepath.Join(root, "kernel", "build"), args...)
	// The processes that it started must not outlive it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = errors.Join(ctx.Err(), err)
		return Tree{}, fmt.Errorf("build the %s kernel: %w: %s",
			strings.Join(args, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	dir := strings.TrimSpace(string(out))
	return Tree{
		BzImage:   filepath.Join(dir, "bzImage"),
		Config:    filepath.Join(dir, "config"),
		Include:   filepath.Join(dir, "include"),
		Selftests: filepath.Join(dir, "selftests"),
	}, nil
}

// CompileC compiles sources with gcc into a static program. gcc runs in dir, so relative names are below dir. sources
// may include flags, such as -isystem and a Tree's Include. Warnings are errors.
func CompileC(ctx context.Context, dir, out string, sources ...string) error {
	args := append([]string{"-static", "-O2", "-Wall", "-Werror", "-o", out}, sources...)
	cmd := exec.CommandContext(ctx, "gcc", args...)
	cmd.Dir = dir
	if msg, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("gcc %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(msg))
	}
	return nil
}
