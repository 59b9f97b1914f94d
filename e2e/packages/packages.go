// SPDX-License-Identifier: Apache-2.0

// Package packages makes packages of migrated, with any version, for tests that install them.
package packages

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
)

// Make makes a package of build/migrated, "deb" or "rpm", in a directory. It returns the package's path.
func Make(ctx context.Context, checkout, dir, version, format string) (string, error) {
	cmd := exec.CommandContext(ctx, checkout+"/scripts/packages", version, dir, format)
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return "", fmt.Errorf("%v: %w: %s", cmd, err, exit.Stderr)
	}
	return strings.TrimSpace(string(out)), err
}
