// SPDX-License-Identifier: Apache-2.0

// Package emulator has the QEMUs that are not installed but fetched, by scripts/qemu.
package emulator

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/migrated-vm/migrated/e2e/checkout"
)

// The versions that scripts/qemu knows.
const (
	V10 = "10.0"
	V11 = "11.1"
)

// Dir returns the directory with that version of QEMU; what is in it stands in scripts/qemu. A version that was never
// asked for is downloaded first, which scripts/setup has done before tests.
func Dir(ctx context.Context, version string) (string, error) {
	root, err := checkout.Root()
	if err != nil {
		return "", fmt.Errorf("QEMU %s: %w", version, err)
	}
	cmd := exec.CommandContext(ctx, filepath.Join(root, "scripts", "qemu"), version)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("QEMU %s: %w: %s", version, err, bytes.TrimSpace(stderr.Bytes()))
	}
	return strings.TrimSpace(string(out)), nil
}

// Command returns the path of the command that starts that version of QEMU. The program of its process is the loader
// that came with QEMU, so a daemon would not take it for a QEMU.
func Command(ctx context.Context, version string) (string, error) {
	dir, err := Dir(ctx, version)
	return filepath.Join(dir, "qemu-system-x86_64"), err
}
