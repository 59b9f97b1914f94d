// SPDX-License-Identifier: Apache-2.0

// Package kernel builds the kernels that kernel/ is about and boots them, for
// tests: Build makes one, CompileC and Initramfs make what runs in it, and Boot
// runs it under QEMU and reads its console.
package kernel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/migrated-vm/migrated/e2e/checkout"
)

// Variant is one of the kernels that kernel/build knows.
type Variant string

// The variants. They come from the same source and, but for Debug, from the
// same configuration.
const (
	Stock   Variant = "stock"   // as Debian has it
	Patched Variant = "patched" // with the series
	Debug   Variant = "debug"   // with the series and all that finds mistakes
)

// Tree is a built kernel.
type Tree struct {
	BzImage   string // what QEMU boots
	Config    string // its configuration
	Include   string // its exported headers, for gcc -isystem
	Selftests string // the kernel's own tests that the series changes; missing in Stock
}

// Build builds a kernel unless it is there. That takes minutes: 'make -C kernel
// build' does it before go test counts its time.
func Build(ctx context.Context, v Variant) (Tree, error) {
	return build(ctx, string(v))
}

// build runs kernel/build with args.
func build(ctx context.Context, args ...string) (Tree, error) {
	root, err := checkout.Root()
	if err != nil {
		return Tree{}, err
	}
	cmd := exec.CommandContext(ctx, filepath.Join(root, "kernel", "build"), args...)
	// What it started must not go on without it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = errors.Join(ctx.Err(), err)
		return Tree{}, fmt.Errorf("build the %s kernel: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	dir := strings.TrimSpace(string(out))
	return Tree{
		BzImage:   filepath.Join(dir, "bzImage"),
		Config:    filepath.Join(dir, "config"),
		Include:   filepath.Join(dir, "include"),
		Selftests: filepath.Join(dir, "selftests"),
	}, nil
}

// CompileC makes a static program of sources with gcc, which runs in dir: names
// that do not start with a slash are below it. Among the sources may stand
// flags, such as -isystem and a Tree's Include. Warnings are errors.
func CompileC(ctx context.Context, dir, out string, sources ...string) error {
	args := append([]string{"-static", "-O2", "-Wall", "-Werror", "-o", out}, sources...)
	cmd := exec.CommandContext(ctx, "gcc", args...)
	cmd.Dir = dir
	if msg, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("gcc %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(msg))
	}
	return nil
}
