// SPDX-License-Identifier: Apache-2.0

// Package emulator provides versions of QEMU that are not installed but fetched by scripts/qemu.
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

// Dir returns the directory with that version of QEMU; scripts/qemu describes its content. A version is downloaded when
// it is first asked for, which scripts/setup has done before tests.
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

// Command returns the path of the command that starts that version of QEMU. The process's program is the loader that
// came with QEMU, so a daemon would not recognize it as a QEMU.
func Command(ctx context.Context, version string) (string, error) {
	dir, err := Dir(ctx, version)
	return filepath.Join(dir, "qemu-system-x86_64"), err
}
