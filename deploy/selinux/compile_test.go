// SPDX-License-Identifier: Apache-2.0

package selinux_test

import (
	"bytes"
	"errors"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/e2e/kernel/refpolicy"
	"github.com/migrated-vm/migrated/pkg/testenv"
)

// referencePolicy returns all modules of Debian's policy as CIL files.
func referencePolicy(t *testing.T) []string {
	t.Helper()
	modules, err := refpolicy.Modules(t.Context())
	if err != nil {
		testenv.CannotRun(t, "%v", err)
	}
	return modules
}

// moduleFiles are what an operator installs.
func moduleFiles(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob("*.cil")
	if err != nil || len(files) == 0 {
		t.Fatalf("the module's files: %q, %v", files, err)
	}
	return files
}

// basePolicy is the small policy of the end-to-end test.
const basePolicy = "../../e2e/kernel/secure/policy/base.cil"

// A rejection is what the compiler says of a policy that it does not accept.
type rejection struct{ text string }

func (r *rejection) Error() string { return r.text }

// compile makes a binary policy with the neverallow rules checked, and returns its path. args come
// before the files.
func compile(t *testing.T, files []string, args ...string) (string, error) {
	t.Helper()
	needPrograms(t, "secilc")
	out := filepath.Join(t.TempDir(), "policy")
	all := slices.Concat(
		[]string{"-c", "33", "-o", out, "-f", filepath.Join(filepath.Dir(out), "file_contexts")}, args, files)
	said, err := exec.CommandContext(t.Context(), "secilc", all...).CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return "", &rejection{string(said)}
	}
	if err != nil {
		t.Fatal(err)
	}
	return out, nil
}

func mustCompile(t *testing.T, files []string, args ...string) string {
	t.Helper()
	policy, err := compile(t, files, args...)
	if err != nil {
		t.Fatalf("secilc: %v", err)
	}
	return policy
}

// needPrograms are Debian's secilc, setools, policycoreutils, apt and dpkg.
func needPrograms(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		if _, err := exec.LookPath(name); err != nil {
			testenv.CannotRun(t, "%v: install the packages of scripts/setup", err)
		}
	}
}

// search runs sesearch on a policy and returns the rules it finds, sorted.
func search(t *testing.T, policy string, args ...string) []string {
	t.Helper()
	needPrograms(t, "sesearch")
	cmd := exec.CommandContext(t.Context(), "sesearch", append(args, policy)...)
	var said bytes.Buffer
	cmd.Stderr = &said
	text, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %v\n%s", cmd, err, said.String())
	}
	var rules []string
	for line := range strings.Lines(string(text)) {
		if line = strings.TrimSpace(line); line != "" {
			rules = append(rules, line)
		}
	}
	slices.Sort(rules)
	return rules
}
