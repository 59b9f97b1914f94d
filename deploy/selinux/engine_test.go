// SPDX-License-Identifier: Apache-2.0

package selinux_test

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// methods of uffd.UFFD, each of which is one ioctl.
var methods = map[string]string{
	"API": "API", "Register": "REGISTER", "Unregister": "UNREGISTER", "Wake": "WAKE", "Copy": "COPY",
	"Zeropage": "ZEROPAGE", "Move": "MOVE", "WriteProtect": "WRITEPROTECT", "Continue": "CONTINUE", "Poison": "POISON",
}

// TestOrdersAreTheEngines: D4 permits the ioctls that the program's code calls, and no others.
func TestOrdersAreTheEngines(t *testing.T) {
	numbers := ioctlNumbers(t)
	want := make(map[string]bool)
	for name := range calledMethods(t) {
		number, known := numbers[methods[name]]
		if !known {
			t.Fatalf("pkg/uffd/internal/abi has no UFFDIO_%s", methods[name])
		}
		want[number] = true
	}
	got := make(map[string]bool)
	text := read(t, "migrated.cil")
	_, orders, found := strings.Cut(text, "(permissionx migrated_uffd_orders (ioctl anon_inode (")
	if !found {
		t.Fatal("migrated.cil has no migrated_uffd_orders")
	}
	orders, _, _ = strings.Cut(orders, ")))")
	for _, number := range regexp.MustCompile(`0x[0-9a-f]+`).FindAllString(orders, -1) {
		got[number] = true
	}
	if diff := cmp.Diff(slices.Sorted(maps.Keys(want)), slices.Sorted(maps.Keys(got))); diff != "" {
		t.Errorf("(-what the code calls, +what migrated.cil permits):\n%s", diff)
	}
}

// calledMethods looks for calls on what is named UFFD, or u as the engine calls it in short.
func calledMethods(t *testing.T) map[string]bool {
	t.Helper()
	called := make(map[string]bool)
	inspect := func(n ast.Node) bool {
		call, ok := n.(*ast.CallExpr)
		if !ok {
			return true
		}
		method, ok := call.Fun.(*ast.SelectorExpr)
		if !ok || methods[method.Sel.Name] == "" {
			return true
		}
		switch on := method.X.(type) {
		case *ast.SelectorExpr:
			called[method.Sel.Name] = called[method.Sel.Name] || on.Sel.Name == "UFFD"
		case *ast.Ident:
			called[method.Sel.Name] = called[method.Sel.Name] || on.Name == "u"
		}
		return true
	}
	for _, dir := range []string{"../../pkg/postcopy", "../../internal", "../../cmd"} {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
			if err == nil {
				ast.Inspect(file, inspect)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	maps.DeleteFunc(called, func(_ string, is bool) bool { return !is })
	return called
}

// ioctlNumbers are the low 16 bits, type and number, which is what a policy sees.
func ioctlNumbers(t *testing.T) map[string]string {
	t.Helper()
	constants := regexp.MustCompile(`(?m)^\s+UFFDIO_([A-Z]+)\s+= (0x[0-9a-f]{8})$`)
	numbers := make(map[string]string)
	for _, match := range constants.FindAllStringSubmatch(read(t, "../../pkg/uffd/internal/abi/zabi_linux.go"), -1) {
		request, err := strconv.ParseUint(match[2], 0, 32)
		if err != nil {
			t.Fatal(err)
		}
		numbers[match[1]] = fmt.Sprintf("%#x", request&0xffff)
	}
	return numbers
}

// TestPagemapOrderIsTheEngines: M2 permits the one ioctl that pkg/uffd performs on a pagemap, and no other.
func TestPagemapOrderIsTheEngines(t *testing.T) {
	code := regexp.MustCompile(`PAGEMAP_SCAN\s+= (0x[0-9a-f]+)`).
		FindStringSubmatch(read(t, "../../pkg/uffd/internal/abi/zpagemap_linux.go"))
	rule := regexp.MustCompile(`\(permissionx migrated_pagemap_scan \(ioctl file \((0x[0-9a-f]+)\)\)\)`).
		FindStringSubmatch(read(t, "migrated_host.cil"))
	if code == nil || rule == nil {
		t.Fatalf("the code has %q, the module %q", code, rule)
	}
	request, err := strconv.ParseUint(code[1], 0, 32)
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("%#x", request&0xffff); rule[1] != want {
		t.Errorf("the code asks %s, migrated_host.cil permits %s", want, rule[1])
	}
}

// TestReadme: README.md explains every group of rules, and none that is not there.
func TestReadme(t *testing.T) {
	documented := regexp.MustCompile(`(?m)^\| ([A-Z]\d+) \|`)
	inReadme, inModule := make(map[string]bool), make(map[string]bool)
	for _, match := range documented.FindAllStringSubmatch(read(t, "README.md"), -1) {
		inReadme[match[1]] = true
	}
	for _, file := range moduleFiles(t) {
		for line := range strings.Lines(read(t, file)) {
			if match := ruleComment.FindStringSubmatch(line); match != nil {
				inModule[match[1]] = true
			}
		}
	}
	if diff := cmp.Diff(slices.Sorted(maps.Keys(inModule)), slices.Sorted(maps.Keys(inReadme))); diff != "" {
		t.Errorf("(-rules of the module, +rows of README.md):\n%s", diff)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
