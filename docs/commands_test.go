// SPDX-License-Identifier: Apache-2.0

package docs

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/e2e/guide"
)

// programs are what a command begins with. A block that has such a line is marked as commands.
var programs = []string{
	"apt", "apt-get", "cat", "cd", "cp", "criu", "curl", "dnf", "docker", "dpkg", "editor", "git", "go", "grep", "grpcurl",
	"host-a#", "host-b#", "install", "kubectl", "make", "migrated", "mkdir", "openssl", "promtool", "ps",
	"qemu-system-x86_64", "restorecon", "rpm", "runuser", "scp", "secilc", "semodule", "ssh", "sudo", "systemctl",
	"systemd-run", "useradd", "virsh", "$",
}

// TestEachCommandIsRun: each block of commands names the test that runs it, and that test asks for the blocks of this
// page; or it says why none does. All others have no command in them.
func TestEachCommandIsRun(t *testing.T) {
	tests := testSources(t)
	all, err := guide.All()
	if err != nil {
		t.Fatal(err)
	}
	run, notRun := 0, 0
	for _, page := range all {
		for _, b := range page.Blocks {
			switch source := tests[b.RunBy]; {
			case !b.HasCommands():
				if b.RunBy != "" || b.NotRun != "" {
					t.Errorf("%s:%d: a block of %q is no commands, and cannot be run", page.Path, b.Line, b.Language)
				}
				for line := range strings.Lines(b.Text) {
					if first := strings.Fields(line); len(first) > 1 && !strings.HasPrefix(line, " ") &&
						slices.Contains(programs, first[0]) {
						t.Errorf("%s:%d: %q is a command: have its block begin with ```sh, "+
							"and with what runs it (package e2e/guide) above", page.Path, b.Line, strings.TrimSpace(line))
					}
				}
			case b.NotRun != "":
				notRun++
			case b.RunBy == "":
				t.Errorf("%s:%d: no test runs these commands, and nothing says why (package e2e/guide)", page.Path, b.Line)
			case source == "":
				t.Errorf("%s:%d: there is no %s", page.Path, b.Line, b.RunBy)
			case !strings.Contains(source, `guide.Read("`+page.Path+`")`):
				t.Errorf("%s:%d: %s does not read this page", page.Path, b.Line, b.RunBy)
			default:
				run++
			}
			for _, c := range b.Commands() {
				if _, err := guide.Calls(c.Text, "migrated"); b.HasCommands() && err != nil {
					t.Errorf("%s:%d: no shell reads this: %v", page.Path, b.Line, err)
				}
			}
		}
	}
	if run < 20 {
		t.Errorf("only %d blocks are run", run)
	}
	t.Logf("%d blocks are run, %d are not", run, notRun)
}

// testSources are the files that have a test, by its name.
func testSources(t *testing.T) map[string]string {
	t.Helper()
	sources := make(map[string]string)
	err := filepath.WalkDir("..", func(path string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() && (entry.Name() == "build" || entry.Name() == ".git") {
			return filepath.SkipDir
		}
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		source := read(t, path)
		for _, m := range definedTest.FindAllStringSubmatch(source, -1) {
			sources[m[1]] += source
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return sources
}

// TestCommandsThatNeedNothing runs those that look at the machine as it is.
func TestCommandsThatNeedNothing(t *testing.T) {
	page, err := guide.Read("docs/criu.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks, err := page.RunBy(t.Name())
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range blocks {
		for _, c := range b.Commands() {
			if out, err := exec.CommandContext(t.Context(), "sh", "-ec", c.Text).CombinedOutput(); err != nil {
				t.Errorf("%s:%d: %s: %v\n%s", page.Path, b.Line, c.Text, err, out)
			}
		}
	}
}

// TestMakeVariables: the Makefile describes each variable that it is given, and uses each that it describes, and
// "make help" lists all targets.
func TestMakeVariables(t *testing.T) {
	described := regexp.MustCompile(`(?m)^#   ([A-Z0-9_]+)=`)
	used := regexp.MustCompile(`\$\(([A-Z0-9_]+)\)`)
	set := regexp.MustCompile(`(?m)^([A-Z0-9_]+) [:?]?=`)
	text, err := os.ReadFile("../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	head, body, _ := strings.Cut(string(text), "\nSHELL")
	known := map[string]bool{"MAKE": true, "CURDIR": true, "MAKEFILE_LIST": true}
	for _, m := range set.FindAllStringSubmatch(body, -1) {
		known[m[1]] = true
	}
	for _, m := range described.FindAllStringSubmatch(head, -1) {
		known[m[1]] = true
		if name := m[1]; name != "KERNEL" && !strings.Contains(body, "$("+name+")") { // kernel/Makefile uses that one
			t.Errorf("the Makefile describes %s and does not use it", name)
		}
	}
	for _, m := range used.FindAllStringSubmatch(body, -1) {
		if !known[m[1]] {
			t.Errorf("the Makefile uses %s and does not describe it", m[1])
		}
	}
	listed := regexp.MustCompile(`(?m)^([a-z0-9-]+):.* ## `)
	commands := map[string]bool{"kernel-tests": true} // of kernel/Makefile alone
	for _, m := range listed.FindAllStringSubmatch(body, -1) {
		commands[m[1]] = true
	}
	for _, m := range regexp.MustCompile(`(?m)^\.PHONY: (\S+)$`).FindAllStringSubmatch(body, -1) {
		if !commands[m[1]] {
			t.Errorf("make help does not list %s", m[1])
		}
	}
}

// TestMakeTargetsExist: what the documentation says of make is in the Makefile.
func TestMakeTargetsExist(t *testing.T) {
	targets := map[string]string{}
	for _, dir := range []string{"", "kernel"} {
		text, err := os.ReadFile(filepath.Join("..", dir, "Makefile"))
		if err != nil {
			t.Fatal(err)
		}
		targets[dir] = "\n" + string(text)
	}
	variable := regexp.MustCompile(`^[A-Z0-9_]+=`)
	all, err := guide.All()
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, page := range all {
		check := func(line int, script string) {
			calls, err := guide.Calls(script, "make")
			if err != nil {
				return // of a block it was said; in the text it is no command
			}
			for _, call := range calls {
				dir := ""
				if len(call) > 1 && call[0] == "-C" {
					dir, call = call[1], call[2:]
				}
				for _, word := range call {
					found++
					if !variable.MatchString(word) && !strings.Contains(targets[dir], "\n"+word+":") {
						t.Errorf("%s:%d: make has no target %s", page.Path, line, word)
					}
				}
			}
		}
		for _, b := range page.Blocks {
			if b.HasCommands() {
				for _, c := range b.Commands() {
					check(b.Line, c.Text)
				}
			}
		}
		for _, code := range page.Inline {
			check(code.Line, code.Text)
		}
	}
	if found < 30 {
		t.Errorf("only %d targets were found", found)
	}
}
