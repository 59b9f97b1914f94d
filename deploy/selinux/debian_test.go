// SPDX-License-Identifier: Apache-2.0

package selinux_test

import (
	"bytes"
	"compress/bzip2"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sync/errgroup"
)

// The reference policy that the module is tested against, as it is installed on a Debian 12 host.
const referencePackage, referenceVersion = "selinux-policy-default", "2:2.20221101-9"

// toCIL is the program of policycoreutils that turns a compiled module into CIL, as semodule does.
const toCIL = "/usr/libexec/selinux/hll/pp"

// referencePolicy returns all modules of Debian's policy as CIL files. The package is downloaded
// once, into the user's cache, and never installed.
func referencePolicy(t *testing.T) []string {
	t.Helper()
	needPrograms(t, "apt-get", "dpkg-deb", toCIL)
	base, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(base, "migrated", referencePackage+"-"+strings.ReplaceAll(referenceVersion, ":", "_"))
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		convertReferencePolicy(t, dir)
	} else if err != nil {
		t.Fatal(err)
	}
	modules, err := filepath.Glob(filepath.Join(dir, "*.cil"))
	if err != nil || len(modules) < 300 {
		t.Fatalf("%s holds %d modules (%v): remove it and try again", dir, len(modules), err)
	}
	return modules
}

// convertReferencePolicy makes dir appear whole.
func convertReferencePolicy(t *testing.T, dir string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	work, err := os.MkdirTemp(filepath.Dir(dir), ".making-selinux-policy-*")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(work)
	run := func(name string, args ...string) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), name, args...)
		cmd.Dir = work
		if out, err := cmd.CombinedOutput(); err != nil {
			cannotRun(t, "%v: %v\n%s", cmd, err, out)
		}
	}
	run("apt-get", "download", "--quiet", referencePackage+"="+referenceVersion)
	packages, err := filepath.Glob(filepath.Join(work, "*.deb"))
	if err != nil || len(packages) != 1 {
		t.Fatalf("apt-get downloaded %q: %v", packages, err)
	}
	run("dpkg-deb", "--extract", packages[0], "root")
	modules, err := filepath.Glob(filepath.Join(work, "root/usr/share/selinux/default/*.pp.bz2"))
	if err != nil {
		t.Fatal(err)
	}
	made := filepath.Join(work, "cil")
	if err := os.Mkdir(made, 0o755); err != nil {
		t.Fatal(err)
	}
	group, ctx := errgroup.WithContext(t.Context())
	group.SetLimit(4)
	for _, module := range modules {
		name := strings.TrimSuffix(filepath.Base(module), ".pp.bz2")
		group.Go(func() error { return convert(ctx, module, filepath.Join(made, name+".cil")) })
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(made, dir); err != nil && !errors.Is(err, os.ErrExist) { // or another test was faster
		t.Fatal(err)
	}
}

func convert(ctx context.Context, module, cil string) error {
	in, err := os.Open(module)
	if err != nil {
		return err
	}
	defer in.Close()
	cmd := exec.CommandContext(ctx, toCIL)
	cmd.Stdin = bzip2.NewReader(in)
	out, err := cmd.Output()
	if err != nil {
		return err
	}
	return os.WriteFile(cil, out, 0o644)
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
	all := slices.Concat([]string{"-c", "33", "-o", out, "-f", filepath.Join(filepath.Dir(out), "file_contexts")}, args, files)
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
			cannotRun(t, "%v: install the packages of scripts/setup", err)
		}
	}
}

// cannotRun says why a test cannot run here, which CI does not accept.
func cannotRun(t *testing.T, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
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
