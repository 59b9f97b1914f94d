// SPDX-License-Identifier: Apache-2.0

// Package rwp runs pkg/uffd in a booted Linux 7.3, which tells which pages a process touches, and measures what that
// costs. The programs that run in the kernel are in guest.
package rwp

import (
	"context"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/migrated-vm/migrated/e2e/image"
	"github.com/migrated-vm/migrated/e2e/kernel"
	"github.com/migrated-vm/migrated/pkg/testenv"
)

// patience bounds a boot. Nothing waits that long unless it is broken.
const patience = 10 * time.Minute

// TestOlderKernel: if the kernel lacks these features, the error names them and the release that has them.
func TestOlderKernel(t *testing.T) {
	bzImage, err := image.DebianKernel(t.Context(), image.Linux61)
	if err != nil {
		testenv.CannotRun(t, "%v", err)
	}
	want := map[string]string{
		"features":   "UFFD_FEATURE_RWP|UFFD_FEATURE_RWP_ASYNC needs 7.3",
		"handshake":  "UFFD_FEATURE_RWP needs 7.3",
		"categories": "PAGE_IS_PRESENT|PAGE_IS_ACCESSED needs 7.3",
		"scan":       "PAGEMAP_SCAN needs 6.7",
	}
	if diff := cmp.Diff(want, boot(t, kernel.Options{Kernel: bzImage}, "support", nil)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// here are the tests of pkg/uffd that 7.3 must not skip. They show what no other kernel can.
var here = []string{
	"TestRWProtect/anon", "TestRWProtect/shmem", "TestRWProtect/hugetlb",
	"TestWorkingSet/anon", "TestWorkingSet/shmem", "TestWorkingSet/hugetlb", "TestOwnWorkingSet",
	"TestSetMode/anon", "TestSetMode/shmem", "TestSetMode/hugetlb", "TestRWPErrors",
	"TestScanPresent/anon", "TestScanPresent/shmem", "TestScanPresent/hugetlb", "TestScanManyRegions",
	"TestScanWritten/anon", "TestScanWritten/shmem", "TestScanWritten/hugetlb",
}

// elsewhere are the tests that are skipped there: those for the patched kernel, and for one with transparent huge
// pages.
var elsewhere = []string{"TestOpenSecureAlone", "TestCollapseFillsMissing"}

// supported is what the guest reports of a kernel with all of these features.
var supported = map[string]string{
	"features": "has it", "handshake": "has it", "categories": "has it", "scan": "has it",
	// The pages that a virtual CPU has touched through KVM's page tables. The first page has its program.
	"vcpu-private-0": "[0 3 17 200]", "vcpu-private-1": "[0 17]", "vcpu-private-2": "[0 4 5 6 255]",
	"vcpu-shared-0": "[0 3 17 200]", "vcpu-shared-1": "[0 17]", "vcpu-shared-2": "[0 4 5 6 255]",
}

// TestLinux73: Linux 7.3 names exactly the pages that were touched, by a process or by a virtual CPU, in each kind of
// memory; and all other tests of pkg/uffd pass.
func TestLinux73(t *testing.T) {
	got := boot(t, kernel.Options{Kernel: linux73(t)}, "support vcpu tests", testFiles(t))
	for name, want := range supported {
		if got[name] != want {
			t.Errorf("%s: %s, want %s", name, got[name], want)
		}
		delete(got, name)
	}
	for _, name := range here {
		if got[name] != "PASS" {
			t.Errorf("%s: %q", name, got[name])
		}
	}
	for name, outcome := range got {
		if outcome != "PASS" && (outcome != "SKIP" || !slices.Contains(elsewhere, name)) {
			t.Errorf("%s: %s", name, outcome)
		}
	}
}

// TestMeasure prints the cost of a scan and of a touched page in 7.3, when asked to. The machine is emulated, so the
// numbers can only be compared with each other. See docs/fault-budget.md.
func TestMeasure(t *testing.T) {
	if os.Getenv("MEASURE") == "" {
		t.Skip("it takes minutes: MEASURE=1 asks for it")
	}
	got := boot(t, kernel.Options{Kernel: linux73(t), CountInstructions: true, CPUs: 1}, "measure", qemuFiles(t))
	for _, memory := range []string{"private", "shared"} {
		for _, name := range []string{"present-scan", "written-none-scan", "accessed-none-scan", "accessed-apart-scan"} {
			if got[memory+"-"+name] == "" {
				t.Errorf("%s-%s was not measured", memory, name)
			}
		}
	}
}

// linux73 returns the path of the stock kernel 7.3 of kernel/.
func linux73(t *testing.T) string {
	t.Helper()
	kernel.Only(t, kernel.Linux73)
	tree, err := kernel.Build(t.Context(), kernel.Linux73, kernel.Stock)
	if err != nil {
		testenv.CannotRun(t, "%v", err)
	}
	return tree.BzImage
}

// testFiles returns the tests of pkg/uffd, and the process whose memory they use.
func testFiles(t *testing.T) []kernel.File {
	t.Helper()
	if _, err := exec.LookPath("gcc"); err != nil {
		testenv.CannotRun(t, "%v: install the packages of scripts/setup", err)
	}
	dir, pkg := t.TempDir(), "../../../pkg/uffd"
	child, test := filepath.Join(dir, "child"), filepath.Join(dir, "uffd.test")
	// With the flags that the package itself uses.
	if err := kernel.CompileC(t.Context(), pkg, child, "-O1", "-pthread", "uffdtest/testdata/child.c"); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "go", "test", "-c", "-o", test, ".")
	cmd.Dir = pkg
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if said, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", cmd, err, said)
	}
	return []kernel.File{{Name: "tests/uffd.test", Path: test}, {Name: "tests/child", Path: child}}
}

// loaded matches the files in ldd's output.
var loaded = regexp.MustCompile(`(?:=> )?(/\S+) \(0x`)

// qemuFiles returns the installed QEMU and the files that it needs.
func qemuFiles(t *testing.T) (files []kernel.File) {
	t.Helper()
	const program = "/usr/bin/qemu-system-x86_64"
	out, err := exec.CommandContext(t.Context(), "ldd", program).CombinedOutput()
	if err != nil {
		testenv.CannotRun(t, "ldd %s: %v: %s", program, err, out)
	}
	names := []string{program, "/usr/share/seabios/bios-256k.bin", "/usr/share/qemu/kvmvapic.bin",
		"/usr/lib/x86_64-linux-gnu/qemu/accel-tcg-x86_64.so"}
	for _, match := range loaded.FindAllStringSubmatch(string(out), -1) {
		names = append(names, match[1])
	}
	for _, name := range names {
		files = append(files, kernel.File{Name: name, Path: name})
	}
	return files
}

// boot runs these parts of the guest in a kernel and returns what they report.
func boot(t *testing.T, o kernel.Options, parts string, files []kernel.File) map[string]string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for _, name := range []string{"dev", "proc", "sys", "tmp"} {
		files = append(files, kernel.File{Name: name, Mode: fs.ModeDir | 0o755})
	}
	initrd, err := kernel.Guest(ctx, t.TempDir(), files...)
	if err != nil {
		t.Fatal(err)
	}
	o.Initrd, o.MemoryMiB, o.CommandLine = initrd, 2048, "loglevel=5 mitigations=off -- "+parts
	got, err := kernel.Results(ctx, o, func(line string) { t.Log(line) })
	if err != nil {
		t.Error(err)
	}
	return got
}
