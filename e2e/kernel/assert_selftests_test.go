// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"path/filepath"
	"strings"
	"testing"
)

// selftests compiles the kernel's own tests that are asked for, from the source of that kernel and with its headers.
// policy is the policy of these tests, and the file that gives it a place in the policy of this package.
func selftests(t *testing.T, tree Tree, ask []assertion) (programs []File, policy []string) {
	t.Helper()
	for _, a := range ask {
		name, ok := strings.CutPrefix(a.name, "selftest-")
		if !ok {
			continue
		}
		// The kernel's names use both hyphens and underscores.
		source := one(t, filepath.Join(tree.Selftests, "*", strings.ReplaceAll(name, "-", `[\-_]`)+".c"))
		dir, file := filepath.Split(source)
		program := strings.TrimSuffix(file, ".c")
		out := filepath.Join(t.TempDir(), program)
		if err := CompileC(testContext(t), dir, out, "-isystem", tree.Include, "-I"+tree.Selftests, file); err != nil {
			t.Fatal(err)
		}
		programs = append(programs, File{Name: "selftests/" + program, Path: out})
	}
	if len(programs) > 0 {
		policy = []string{
			filepath.Join(tests, "selftests.cil"),
			one(t, filepath.Join(tree.Selftests, "selinux", "*.cil")),
		}
	}
	return programs, policy
}

// one returns the only file that matches a pattern.
func one(t *testing.T, pattern string) string {
	t.Helper()
	files, err := filepath.Glob(pattern)
	if err != nil || len(files) != 1 {
		t.Fatalf("one file is expected to match %s: %q, %v", pattern, files, err)
	}
	return files[0]
}
