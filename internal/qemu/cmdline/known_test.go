// SPDX-License-Identifier: Apache-2.0

package cmdline

import (
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/pkg/testenv"
)

// helpLine matches the options at the begin of a line of QEMU's -help: "-h or -help     display", "-fda/-fdb file".
var helpLine = regexp.MustCompile(`(?m)^--?[A-Za-z][\w-]*((/| or )-[A-Za-z][\w-]*)*`)

// TestKnownOptions asks the installed QEMU which of its options have a value. Before QEMU prints its version it parses
// all arguments.
func TestKnownOptions(t *testing.T) {
	binary, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		testenv.CannotRun(t, "%v", err)
	}
	help, err := exec.Command(binary, "-help").Output()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, line := range helpLine.FindAllString(string(help), -1) {
		for _, name := range strings.FieldsFunc(line, func(r rune) bool { return r == '/' || r == ' ' }) {
			if name = strings.TrimLeft(name, "-"); name != "or" && !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	if len(names) < 80 {
		t.Fatalf("-help has only the options %q", names)
	}
	all := []string{"-version"}
	for _, name := range names {
		switch isFlag, isValued := slices.Contains(flags, name), slices.Contains(valued, name); {
		case isFlag && isValued:
			t.Errorf("-%s is in both lists", name)
		case isFlag:
			if out, err := exec.Command(binary, "-version", "-"+name).CombinedOutput(); err != nil {
				t.Errorf("-%s is among those without a value, but QEMU says %s", name, out)
			}
		case isValued:
			all = append(all, "-"+name, "-no-such-option") // an error, unless it is a value
		default:
			t.Errorf("-%s is in no list", name)
		}
	}
	if out, err := exec.Command(binary, all...).CombinedOutput(); err != nil {
		t.Errorf("one of the options with a value has none: %s: %v", out, err)
	}
}
