// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/e2e/guide"
	"github.com/migrated-vm/migrated/pkg/testenv"
)

// examplesNotRun are the beginnings of lines of examples that the played daemon cannot answer, with the reason.
var examplesNotRun = map[string]string{
	"migrated serve":                        "runs until it is ended: TestServe and TestManual",
	"migrated evacuate ":                    "the played daemon evacuates nothing: TestEvacuate",
	"migrated evacuation ":                  "the played daemon evacuates nothing: TestEvacuate",
	"migrated vms":                          "the played daemon has no VMs: TestEvacuate",
	"migrated version --daemon host-b:7601": "there is no host-b",
	"migrated list --label evacuation=host-a-7 --under-way --watch": "the played daemon's list does not end: " +
		"internal/daemon, listwatch_test.go",
	"migrated recover ":  "the played daemon loses no connection: TestRecoverAtAnotherAddress",
	"migrated fallback ": "the played daemon loses no host: TestFallBackWhenTheDestinationIsLost",
	"migrated release ":  "the played daemon loses no host: TestWhatIsNotLost, e2e/chaos",
	"migrated abandon ":  "the played daemon loses no host: TestSourceHostLost",
}

// examplesEnd are the exit codes of examples that do not end with 0 with the played daemon.
var examplesEnd = map[string]int{
	"migrated check --vm /run/qemu/db.qmp --to host-b":               exitCheck,
	"migrated check --vm /run/qemu/db.qmp --to host-b --template db": exitCheck,

	"migrated watch db-1 && migrated watch web-1": exitUnknownID,
	"migrated idle && reboot":                     exitUnderWay,
	"migrated delete db-1":                        exitFailed, // it is not over
	"migrated cancel db-1":                        exitFailed, // it has switched over
	"migrated pki show":                           exitFailed, // no daemon here has one
}

// TestHelpExamples runs each line of each example of docs/cli.md, which are those of the help texts, against the played
// daemon.
func TestHelpExamples(t *testing.T) {
	if _, err := exec.LookPath("jq"); err != nil {
		testenv.CannotRun(t, "examples use jq: %v", err)
	}
	page, err := guide.Read("docs/cli.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks, err := page.RunBy(t.Name())
	if err != nil {
		t.Fatal(err)
	}
	used := map[string]bool{}
	for _, b := range blocks {
		t.Run(strconv.Itoa(b.Line), func(t *testing.T) {
			home := t.TempDir()
			socket := filepath.Join(home, "d.sock")
			d, err := startPlayed(socket)
			if err != nil {
				t.Fatal(err)
			}
			defer d.stop()
			// Files that examples name, and a harmless reboot.
			for path, mode := range map[string]os.FileMode{"bin": 0o755, ".config/fish/completions": 0o755} {
				if err := os.MkdirAll(filepath.Join(home, path), mode); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.WriteFile(filepath.Join(home, "bin/reboot"), []byte("#!/bin/sh\n"), 0o755); err != nil {
				t.Fatal(err)
			}
			if strings.Contains(b.Text, "migrated pki issue") {
				prepare(t, home, "migrated pki init")
			}
			if strings.Contains(b.Text, "migrated pki show") {
				prepare(t, home, "migrated pki init && migrated pki issue host-a")
			}
			for line := range strings.SplitSeq(b.Text, "\n") {
				if line == "" || strings.HasPrefix(line, "#") {
					continue
				}
				if why, not := notRun(line, used); not {
					t.Logf("not run: %s: %s", line, why)
					continue
				}
				ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
				sh := exec.CommandContext(ctx, "sh", "-ec", line)
				sh.Dir = home
				sh.Env = append(os.Environ(), "HOME="+home, "PATH="+home+"/bin:"+os.Getenv("PATH"),
					"MIGRATED_DAEMON=unix://"+socket)
				out, err := sh.CombinedOutput()
				cancel()
				var exit *exec.ExitError
				if err != nil && !errors.As(err, &exit) {
					t.Fatal(err)
				}
				if got, want := sh.ProcessState.ExitCode(), examplesEnd[line]; got != want {
					t.Errorf("%s: exit code %d, want %d\n%s", line, got, want, out)
				}
			}
		})
	}
	for begin := range examplesNotRun {
		if !used[begin] {
			t.Errorf("no example begins with %q any more", begin)
		}
	}
}

// prepare runs commands that an example needs to have been run before.
func prepare(t *testing.T, dir, script string) {
	t.Helper()
	sh := exec.CommandContext(t.Context(), "sh", "-ec", script)
	sh.Dir = dir
	if out, err := sh.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
}

// notRun says whether an example is not run, and why, and marks the reason as used.
func notRun(line string, used map[string]bool) (why string, not bool) {
	for begin, why := range examplesNotRun {
		if strings.HasPrefix(line, begin) {
			used[begin] = true
			return why, true
		}
	}
	return "", false
}
