// SPDX-License-Identifier: Apache-2.0

package secure

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/migrated-vm/migrated/e2e/kernel"
	"github.com/migrated-vm/migrated/pkg/testenv"
)

// TestUserSpace runs the tests of the packages for userfaultfds inside the patched kernel, where they find the flag.
func TestUserSpace(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("gcc"); err != nil {
		testenv.CannotRun(t, "%v: install the packages of scripts/setup", err)
	}
	kernel.Only(t, kernel.Linux612)
	tree, err := kernel.Build(t.Context(), kernel.Linux612, kernel.Patched)
	if err != nil {
		testenv.CannotRun(t, "%v", err)
	}
	dir := t.TempDir()
	files := []kernel.File{
		{Name: "init", Path: build(t, dir, "e2e/kernel/secure/guest"), Mode: 0o755},
		{Name: "usr/bin", Mode: fs.ModeDir | 0o755},
	}
	for _, name := range []string{"proc", "sys", "run", "var", "tmp"} {
		files = append(files, kernel.File{Name: name, Mode: fs.ModeDir | 0o1777})
	}
	for _, c := range []struct{ pkg, source, program string }{
		{"pkg/uffd", "uffdtest/testdata/child.c", "child"},
		{"pkg/uffd/inject", "testdata/target.c", "target"},
	} {
		name := filepath.Base(c.pkg)
		source := filepath.Join("../../..", c.pkg, c.source)
		program := filepath.Join(dir, c.program)
		// With the flags that the packages themselves use.
		if err := kernel.CompileC(t.Context(), ".", program, "-O1", "-pthread", source); err != nil {
			t.Fatal(err)
		}
		test := filepath.Join(dir, name+".test")
		cmd := exec.CommandContext(t.Context(), "go", "test", "-c", "-o", test, module+"/"+c.pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
		if msg, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", cmd, err, msg)
		}
		files = append(files,
			kernel.File{Name: "tests/" + name + "/" + name + ".test", Path: test},
			kernel.File{Name: "tests/" + name + "/" + c.program, Path: program})
	}
	initrd, err := kernel.Initramfs(dir, files)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"uffd": "passes", "uffd-has-flag": "true", "inject": "passes"}
	got, err := boot(t, underSELinux(tree, initrd), "tests")
	if err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
