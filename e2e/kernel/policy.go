// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"context"
	"fmt"
	"os"
	"os/exec"
)

// CompilePolicy makes a binary policy of CIL files, with secilc. args are those
// files, and options of secilc.
func CompilePolicy(ctx context.Context, out string, args ...string) error {
	// Version 33 of the format is the newest that kernels have had since 5.8. Nobody asks for file contexts.
	args = append([]string{"-c", "33", "-o", out, "-f", os.DevNull}, args...)
	if said, err := exec.CommandContext(ctx, "secilc", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("secilc %q: %w\n%s", args, err, said)
	}
	return nil
}
