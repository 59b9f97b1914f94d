// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// skipped is a test that reads the seccomp filter of another process, which needs CONFIG_CHECKPOINT_RESTORE. If it
// cannot read the filter, it acts too late.
const skipped = "TestSeccompFilter/seccomp-kill"

// tests runs the compiled tests of packages in this kernel, each in its directory below /tests.
func tests(ctx context.Context, _ *audit) error {
	programs, err := filepath.Glob("/tests/*/*.test")
	if err != nil || len(programs) == 0 {
		return fmt.Errorf("there are the tests %q: %w", programs, err)
	}
	for _, program := range programs {
		cmd := exec.CommandContext(ctx, program, "-test.v", "-test.skip="+skipped)
		cmd.Dir = filepath.Dir(program)
		cmd.Env = append(os.Environ(), "PATH=/usr/bin", "TMPDIR=/tmp", "HOME=/tmp",
			"UFFDTEST_CHILD="+cmd.Dir+"/child", "INJECT_TEST_TARGET="+cmd.Dir+"/target")
		out, err := cmd.CombinedOutput()
		logf("%s", out)
		name := strings.TrimSuffix(filepath.Base(program), ".test")
		check(name, "passes", err)
		if _, said, there := strings.Cut(string(out), "the kernel has UFFD_SECURE: "); there {
			has, _, _ := strings.Cut(said, ";")
			result(name+"-has-flag", has)
		}
	}
	return nil
}
