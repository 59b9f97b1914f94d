// SPDX-License-Identifier: Apache-2.0

package launch_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/internal/qemu/cmdline"
	"github.com/migrated-vm/migrated/internal/qemu/launch"
	"github.com/migrated-vm/migrated/internal/qemu/process"
	"github.com/migrated-vm/migrated/internal/qemu/qemutest"
)

func TestHook(t *testing.T) {
	qemutest.NeedRoot(t)
	const definition = "<domain><name>a; rm -rf /</name></domain>"
	dir := t.TempDir()
	for _, test := range []struct {
		name, script string
		mode         os.FileMode
		want, words  string // in the definition, or in the error
	}{
		{"none", "", 0, definition, ""},
		{"says nothing", "cat >/dev/null", 0o755, definition, ""},
		{"its arguments", `printf '<%s|%s|%s|%s|%s>' "$#" "$1" "$2" "$3" "$4"`, 0o755, "<4|a; rm -rf /|migrate|begin|->", ""},
		{"changes it", "sed s/domain/changed/g", 0o755, strings.ReplaceAll(definition, "domain", "changed"), ""},
		{"refuses it", "echo no room >&2; exit 3", 0o755, "", "no room (exit status 3)"},
		{"fails silently", "exit 4", 0o755, "", "refuses the domain: exit status 4"},
		{"cannot be executed", "true", 0o644, "", "cannot be executed"},
		{"says too much", "head -c 2000000 /dev/zero", 0o755, "", "more than 1048576 bytes"},
		{"anybody's", "true", 0o777, "", "changed by others than root"},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := filepath.Join(dir, "hook")
			if test.script == "" {
				path += "-that-is-not-there"
			} else {
				_ = os.Remove(path) // from the case before
				if err := os.WriteFile(path, []byte("#!/bin/sh\n"+test.script+"\n"), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.Chmod(path, test.mode); err != nil {
					t.Fatal(err)
				}
			}
			s, err := launch.NewStarter(startCommand, path, []string{"/usr/bin/qemu-system-x86_64"})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			got, err := s.Hook("a; rm -rf /", definition)
			if got != test.want || (err != nil) != (test.words != "") ||
				err != nil && !strings.Contains(err.Error(), test.words) {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
}

// TestNoStarter: where a domain arrives and no process would call the hook, the domain is not started as it is.
func TestNoStarter(t *testing.T) {
	if got, err := (*launch.Starter)(nil).Hook("db", "<domain/>"); err == nil {
		t.Errorf("%q is used without a hook", got)
	}
}

// TestHookWithoutBinaries: the hook is called where no binary is allowed.
func TestHookWithoutBinaries(t *testing.T) {
	s := newStarter(t)
	if got, err := s.Hook("db", "<domain/>"); err != nil || got != "<domain/>" {
		t.Errorf("%q, %v", got, err)
	}
	opts := qemutest.Options(t, process.Credentials{})
	if _, err := s.Launch(opts); !strings.Contains(fmt.Sprint(err), cmdline.ErrNoBinaries.Error()) {
		t.Errorf("without a binary: %v", err)
	}
}
