// SPDX-License-Identifier: Apache-2.0

package abi_test

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unicode"
)

// generated are the generated files and the generator's arguments for them, as in doc.go. The last member is how many
// checks a C compiler makes of each, at least.
var generated = []struct {
	file, header string
	section      []string
	checks       int
}{
	{"zabi_linux.go", "userfaultfd.h", nil, 100},
	{"zpagemap_linux.go", "fs.h", []string{"-from", "PROCFS_IOCTL_MAGIC", "-until", "/proc/<pid>/maps"}, 40},
}

// headers is the directory of the headers.
const headers = "../../abi"

// TestRegenerate checks that the generator makes the committed files from the committed headers.
func TestRegenerate(t *testing.T) {
	for _, g := range generated {
		out := filepath.Join(t.TempDir(), g.file)
		args := append([]string{"run", "../genabi", "-in", filepath.Join(headers, g.header), "-out", out}, g.section...)
		if b, err := exec.Command("go", args...).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, b)
		}
		want, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(g.file)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s is not what %s gives: run go generate ./pkg/uffd/...", g.file, g.header)
		}
	}
}

// TestAgainstCompiler has a C compiler check each number in the generated files against the headers: constants,
// sizes of structs, offsets and sizes of their members.
func TestAgainstCompiler(t *testing.T) {
	for _, g := range generated {
		t.Run(g.header, func(t *testing.T) { againstCompiler(t, g.file, g.header, g.checks) })
	}
}

func againstCompiler(t *testing.T, goFile, header string, atLeast int) {
	if _, err := exec.LookPath("gcc"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	var c strings.Builder
	fmt.Fprintf(&c, "#include <stddef.h>\n#include <stdio.h>\n#include <sys/ioctl.h>\n#include \"%s\"\n"+
		"int main(void) {\n", header)
	checks := 0
	check := func(what, c1, value string) {
		checks++
		fmt.Fprintf(&c, "if ((__u64)(%s) != %sULL) printf(\"%s is %%#llx, not %s\\n\", "+
			"(unsigned long long)(%s));\n", c1, value, what, value, c1)
	}

	file, err := parser.ParseFile(token.NewFileSet(), goFile, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.ValueSpec:
			name, value := n.Names[0].Name, n.Values[0].(*ast.BasicLit).Value
			expr := name
			if rest, ok := strings.CutPrefix(name, "Nr_"); ok {
				expr = "_" + rest
			} else if rest, ok := strings.CutPrefix(name, "Sizeof_"); ok {
				expr = "sizeof(struct " + rest + ")"
			} else if rest, ok := strings.CutPrefix(name, "Offsetof_uffd_msg_"); ok {
				expr = "offsetof(struct uffd_msg, " + strings.ReplaceAll(rest, "_", ".") + ")"
			}
			check(name, expr, value)
		case *ast.TypeSpec:
			strct, size := cName(n.Name.Name), 0
			for _, f := range n.Type.(*ast.StructType).Fields.List {
				member, bytes := cName(f.Names[0].Name), sizes[f.Type.(*ast.Ident).Name]
				if bytes == 0 {
					t.Fatalf("%s.%s: size of %s unknown", strct, member, f.Type)
				}
				check(strct+"."+member, fmt.Sprintf("offsetof(struct %s, %s)", strct, member), fmt.Sprint(size))
				check(strct+"."+member, fmt.Sprintf("sizeof(((struct %s *)0)->%s)", strct, member), fmt.Sprint(bytes))
				size += bytes
			}
			check(strct, "sizeof(struct "+strct+")", fmt.Sprint(size))
		}
		return true
	})
	c.WriteString("return 0; }\n")
	if checks < atLeast {
		t.Fatalf("only %d checks were made, want %d", checks, atLeast)
	}

	dir := t.TempDir()
	source, binary := filepath.Join(dir, "check.c"), filepath.Join(dir, "check")
	if err := os.WriteFile(source, []byte(c.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("gcc", "-I", headers, "-o", binary, source).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	out, err := exec.Command(binary).CombinedOutput()
	if err != nil {
		t.Fatal(err)
	}
	if len(out) != 0 {
		t.Errorf("differences:\n%s", out)
	}
}

// sizes are in bytes; no Go struct of the package has padding, as the generator refuses it.
var sizes = map[string]int{"uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8, "int64": 8, "UffdioRange": 16}

// cName turns UffdioCopy into uffdio_copy.
func cName(name string) string {
	var b strings.Builder
	for i, r := range name {
		if unicode.IsUpper(r) && i > 0 {
			b.WriteByte('_')
		}
		b.WriteRune(unicode.ToLower(r))
	}
	return b.String()
}
