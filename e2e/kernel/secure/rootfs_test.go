// SPDX-License-Identifier: Apache-2.0

package secure

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/e2e/image"
	"github.com/migrated-vm/migrated/e2e/kernel"
	"github.com/migrated-vm/migrated/pkg/testenv"
)

const (
	module     = "github.com/migrated-vm/migrated"
	guestRAM   = 64 // MiB, as guest/vm.go has it
	qemuBinary = "/usr/bin/qemu-system-x86_64"
)

// variants are the variants of the policy that the guest loads: the whole policy and some more CIL.
var variants = map[string]string{
	"base": "",
	// QEMU may not create a descriptor.
	"no-create": `(constrain (anon_inode (create)) (neq t1 svirt_t))`,
	// The daemon may not receive one.
	"no-receive": `(constrain (anon_inode (read)) (or (neq t1 migrated_t) (neq t2 migrated_uffd_t)))`,
}

// rootfs makes the initramfs: the driver as /init, the daemon, QEMU with what it needs, the VM's disk, and more.
func rootfs(t *testing.T, more ...kernel.File) string {
	t.Helper()
	dir := t.TempDir()
	files := []kernel.File{
		{Name: "init", Path: build(t, dir, "e2e/kernel/secure/guest"), Mode: 0o755},
		{Name: "usr/bin/migrated", Path: build(t, dir, "cmd/migrated"), Mode: 0o755},
		{Name: "proc", Mode: fs.ModeDir | 0o555},
		{Name: "sys", Mode: fs.ModeDir | 0o555},
		{Name: "run", Mode: fs.ModeDir | 0o755},
		{Name: "var", Mode: fs.ModeDir | 0o755},
		{Name: "etc", Mode: fs.ModeDir | 0o755},
		{Name: "tmp", Mode: fs.ModeDir | 0o1777},
	}
	disk, err := image.Metal(t.Context(), guestRAM)
	if err != nil {
		testenv.CannotRun(t, "%v", err)
	}
	files = append(files, kernel.File{Name: "disk", Path: disk})
	for _, name := range slices.Concat([]string{qemuBinary}, libraries(t, qemuBinary), []string{
		"/usr/share/seabios/bios-256k.bin", "/usr/share/qemu/kvmvapic.bin",
	}) {
		files = append(files, kernel.File{Name: name, Path: name})
	}
	for _, f := range more {
		same := func(g kernel.File) bool { return strings.TrimPrefix(g.Name, "/") == strings.TrimPrefix(f.Name, "/") }
		if !slices.ContainsFunc(files, same) { // programs share libraries
			files = append(files, f)
		}
	}
	path, err := kernel.Initramfs(dir, files)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// policies returns the compiled variants of SELinux's policy.
func policies(t *testing.T) (files []kernel.File) {
	t.Helper()
	dir := t.TempDir()
	for name, extra := range variants {
		files = append(files, kernel.File{Name: "policy/" + name, Path: compile(t, dir, name, extra)})
	}
	return files
}

// build builds a static program of this module.
func build(t *testing.T, dir, pkg string) string {
	t.Helper()
	out := filepath.Join(dir, filepath.Base(pkg))
	if err := kernel.Program(t.Context(), out, module+"/"+pkg); err != nil {
		t.Fatal(err)
	}
	return out
}

// loaded matches the files in ldd's output.
var loaded = regexp.MustCompile(`(?:=> )?(/\S+) \(0x`)

// libraries returns what the loader loads for a program, the loader included.
func libraries(t *testing.T, program string) []string {
	t.Helper()
	if _, err := os.Stat(program); err != nil {
		testenv.CannotRun(t, "%v: install the packages of scripts/setup", err)
	}
	out, err := exec.CommandContext(t.Context(), "ldd", program).CombinedOutput()
	if err != nil {
		t.Fatalf("ldd: %v\n%s", err, out)
	}
	var files []string
	for _, match := range loaded.FindAllStringSubmatch(string(out), -1) {
		files = append(files, match[1])
	}
	if len(files) < 2 {
		t.Fatalf("ldd names %d libraries:\n%s", len(files), out)
	}
	return files
}

// compile makes a binary policy of the base, deploy/selinux and extra.
func compile(t *testing.T, dir, name, extra string) string {
	t.Helper()
	if _, err := exec.LookPath("secilc"); err != nil {
		testenv.CannotRun(t, "%v: install the packages of scripts/setup", err)
	}
	files, err := filepath.Glob("../../../deploy/selinux/*.cil")
	if err != nil || len(files) == 0 {
		t.Fatalf("deploy/selinux has %q, %v", files, err)
	}
	variant := filepath.Join(dir, name+".cil")
	if err := os.WriteFile(variant, []byte(extra), 0o600); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, name+".policy")
	if err := kernel.CompilePolicy(
		t.Context(), out, slices.Concat([]string{"policy/base.cil", variant}, files)...,
	); err != nil {
		t.Fatal(err)
	}
	return out
}
