// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestBuildIsKept(t *testing.T) {
	first := built(t, Linux612, Stock)
	before, err := os.Stat(first.BzImage)
	if err != nil {
		t.Fatal(err)
	}
	again := built(t, Linux612, Stock)
	after, err := os.Stat(again.BzImage)
	if err != nil {
		t.Fatal(err)
	}
	if again != first || !os.SameFile(before, after) || !after.ModTime().Equal(before.ModTime()) {
		t.Errorf("built again: %+v, then %+v", first, again)
	}
}

func TestHeadersAreExported(t *testing.T) {
	need(t, "gcc")
	eachVersion(t, func(t *testing.T, version Version) {
		dir := t.TempDir()
		source := `#include <linux/userfaultfd.h>
#include <linux/version.h>
_Static_assert(LINUX_VERSION_CODE >> 8 == (MAJOR << 8 | MINOR), "the headers are another version's");
int main(void) { return UFFD_USER_MODE_ONLY - 1; }
`
		major, minor, _ := strings.Cut(string(version), ".")
		for _, v := range []Variant{Stock, Patched} {
			program := source
			if v == Patched {
				program += "_Static_assert(UFFD_SECURE == 2, \"the flag of the series\");\n"
			}
			if err := os.WriteFile(filepath.Join(dir, "a.c"), []byte(program), 0o644); err != nil {
				t.Fatal(err)
			}
			err := CompileC(testContext(t), dir, "a", "-isystem", built(t, version, v).Include,
				"-DMAJOR="+major, "-DMINOR="+minor, "a.c")
			if err != nil {
				t.Errorf("%s: %v", v, err)
			}
		}
	})
}

func TestBuildRefuses(t *testing.T) {
	for _, refused := range []struct {
		version Version
		variant Variant
	}{{Linux73, "no-such-variant"}, {"6.13", Stock}} {
		_, err := Build(testContext(t), refused.version, refused.variant)
		if err == nil || !strings.Contains(err.Error(), "usage: ") {
			t.Errorf("Build(%v) = %v", refused, err)
		}
	}
}

func TestCompileCRefusesWarnings(t *testing.T) {
	need(t, "gcc")
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "a.c"), []byte("int main(void) { int unused; }\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	err := CompileC(testContext(t), dir, "a", "a.c")
	if err == nil || !strings.Contains(err.Error(), "unused variable") {
		t.Errorf("CompileC = %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "a")); err == nil {
		t.Error("there is a program all the same")
	}
}
