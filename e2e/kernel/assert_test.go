// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// tests is the directory of the guest's programs and policy.
const tests = "../../kernel/tests"

// All kernels do what the table says, under an enforcing policy.
func TestAssertions(t *testing.T) {
	eachVersion(t, func(t *testing.T, version Version) {
		for _, v := range []Variant{Stock, Patched} {
			t.Run(string(v), func(t *testing.T) {
				t.Parallel()
				assert(t, version, v, append(slices.Clone(points), own)...)
			})
		}
	})
}

// allPoints returns the whole table.
func allPoints() []point {
	return append(slices.Clone(points), own, underStress)
}

// expected returns the outcome that a kernel is expected to give; empty: it is not asked.
func (a assertion) expected(version Version, v Variant) string {
	want := outcome{a.stock, a.patched}
	if other, differs := in73[a.name]; differs && version == Linux73 {
		want = other
	}
	if v == Stock {
		return want.stock
	}
	return want.patched
}

// assert boots a kernel into the tests of the points and compares the outcomes, with a subtest for each.
func assert(t *testing.T, version Version, v Variant, points ...point) {
	t.Helper()
	needQEMU(t)
	need(t, "gcc", "secilc")
	tree := built(t, version, v)
	var ask []assertion
	for _, p := range points {
		for _, a := range p.assertions {
			if a.expected(version, v) != "" {
				ask = append(ask, a)
			}
		}
	}
	got, log := outcomes(t, v, tree, ask)
	for _, a := range ask {
		t.Run(a.name, func(t *testing.T) {
			t.Log(about(log, a.name))
			if want := a.expected(version, v); got[a.name] != want {
				t.Errorf("%s: %q, want %q", a.shows, got[a.name], want)
			}
		})
	}
}

// outcomes runs the tests in the guest. Each of them, and nothing else, must give one outcome.
func outcomes(t *testing.T, v Variant, tree Tree, ask []assertion) (got map[string]string, log []string) {
	t.Helper()
	limit, memory := patience, 768
	if v == Debug { // it is slower, and needs memory itself
		limit, memory = 2*patience, 1024
	}
	got = map[string]string{}
	done := false
	o := Options{
		Kernel: tree.BzImage,
		Initrd: testInitramfs(t, tree, ask),
		// Notices, to which the audit log belongs, would come between the results. KERNEL_TEST_ARGS=seed=N repeats a race.
		CommandLine: "loglevel=5 " + os.Getenv("KERNEL_TEST_ARGS"),
		MemoryMiB:   memory,
		Args:        v.args(),
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit) // of the guest, which has been compiled by now
	defer cancel()
	err := Boot(ctx, o, func(line string) error {
		log = append(log, line)
		word := strings.Fields(line)
		switch {
		case line == "DONE":
			done = true
		case len(word) == 3 && word[0] == "RESULT":
			if _, twice := got[word[1]]; twice {
				return fmt.Errorf("a second result: %s", line)
			}
			got[word[1]] = word[2]
		}
		return nil
	})
	if err != nil {
		t.Errorf("%v\n%s", err, strings.Join(log, "\n"))
	} else if !done {
		t.Errorf("the guest did not say DONE:\n%s", strings.Join(log, "\n"))
	}
	unknown := 0
	for name := range got {
		if !slices.ContainsFunc(ask, func(a assertion) bool { return a.name == name }) {
			t.Errorf("the guest answers %s, which nobody asked", name)
			unknown++
		}
	}
	if len(got)-unknown != len(ask) {
		t.Errorf("%d answers to %d questions", len(got)-unknown, len(ask))
	}
	return got, log
}

// about returns what the guest says after the previous test's result, up to the result of this test.
func about(log []string, name string) string {
	start := 0
	for i, line := range log {
		if strings.HasPrefix(line, "RESULT "+name+" ") {
			return strings.Join(log[start:i+1], "\n")
		}
		if strings.HasPrefix(line, "RESULT ") {
			start = i + 1
		}
	}
	return strings.Join(log[start:], "\n")
}

// program compiles the guest's /init.
func program(t *testing.T) string {
	t.Helper()
	need(t, "gcc")
	out := filepath.Join(t.TempDir(), "init")
	sources, err := filepath.Glob(tests + "/*.c")
	if err != nil || len(sources) == 0 {
		t.Fatalf("%d sources, %v", len(sources), err)
	}
	for i := range sources {
		sources[i] = filepath.Base(sources[i])
	}
	if err := CompileC(testContext(t), tests, out, sources...); err != nil {
		t.Fatal(err)
	}
	return out
}

// testInitramfs makes an initramfs with the tests, the policy, the kernel's own tests, and the list of what is asked.
func testInitramfs(t *testing.T, tree Tree, ask []assertion) string {
	t.Helper()
	dir := t.TempDir()
	programs, modules := selftests(t, tree, ask)
	policy := filepath.Join(dir, "policy")
	args := append([]string{"--policyvers", "33", "--output", policy, "--filecontext", os.DevNull,
		filepath.Join(tests, "policy.cil")}, modules...)
	if msg, err := exec.CommandContext(testContext(t), "secilc", args...).CombinedOutput(); err != nil {
		t.Fatalf("secilc: %v: %s", err, msg)
	}
	if err := EnablePolicyCapability(policy, PolicyCapabilityMemfdClass); err != nil {
		t.Fatal(err)
	}
	var names bytes.Buffer
	for _, a := range ask {
		fmt.Fprintln(&names, a.name)
	}
	files := []File{
		{Name: "init", Path: program(t)},
		{Name: "policy", Path: policy},
		{Name: "names", Data: names.Bytes()},
	}
	for _, at := range []string{"proc", "sys", "dev", "tmp"} {
		files = append(files, File{Name: at, Mode: fs.ModeDir | 0o755})
	}
	initrd, err := Initramfs(dir, append(files, programs...))
	if err != nil {
		t.Fatal(err)
	}
	return initrd
}

// The table has every test of the guest's program, once.
func TestTableIsComplete(t *testing.T) {
	out, err := exec.CommandContext(testContext(t), program(t), "names").Output()
	if err != nil {
		t.Fatal(err)
	}
	guest := strings.Fields(string(out))
	var table []string
	for _, p := range allPoints() {
		for _, a := range p.assertions {
			table = append(table, a.name)
			if a.patched == "" || a.shows == "" || p.title == "" {
				t.Errorf("%s says too little", a.name)
			}
		}
	}
	for name, o := range in73 {
		i := slices.IndexFunc(points, func(p point) bool {
			return slices.ContainsFunc(p.assertions, func(a assertion) bool {
				return a.name == name && o != outcome{a.stock, a.patched}
			})
		})
		if i < 0 || o.patched == "" {
			t.Errorf("%s is no row of the table, or does not differ in 7.3", name)
		}
	}
	slices.Sort(guest)
	slices.Sort(table)
	if !slices.Equal(guest, table) {
		t.Errorf("the program has\n%s\nthe table has\n%s", strings.Join(guest, "\n"), strings.Join(table, "\n"))
	}
}
