// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestCompleteLine tests the completions of lines, in the protocol that all three
// scripts use.
func TestCompleteLine(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "d.sock")
	d, err := startPlayed(socket)
	if err != nil {
		t.Fatal(err)
	}
	defer d.stop()
	t.Chdir(t.TempDir())
	if err := os.WriteFile("db.qmp", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		line string
		want []string
	}{
		{"migrated mi", []string{"migrate"}},
		{"migrated c", []string{"cancel", "check", "completion"}},
		{"migrated completion ", []string{"bash", "fish", "zsh"}},
		{"migrated migrate --keep", []string{"--keep-source"}},
		{"migrated migrate --vm d", []string{"db.qmp"}},
		{"migrated migrate --id ", []string{"bad-3", "db-1", "web-2"}},
		{"migrated watch d", []string{"db-1"}},
		{"migrated watch --daemon unix:///none ", nil},
		{"migrated migrate --daemon unix:///none --id ", nil},
	} {
		got := proposed(t, test.line, socket)
		for try := 1; len(got) == 0 && test.want != nil && try < 30; try++ {
			got = proposed(t, test.line, socket) // the daemon had not answered within the second that it has
		}
		if !slices.Equal(got, test.want) {
			t.Errorf("%q proposes %q, want %q", test.line, got, test.want)
		}
	}
}

// proposed returns the completions of a line, sorted.
func proposed(t *testing.T, line, socket string) []string {
	t.Helper()
	command := exec.Command("migrated")
	command.Env = append(os.Environ(), "COMP_LINE="+line, "MIGRATED_DAEMON=unix://"+socket)
	out, err := command.Output()
	if err != nil {
		t.Errorf("%q: %v", line, err)
	}
	got := strings.Fields(string(out))
	slices.Sort(got)
	return got
}

// TestCompletionScripts runs the scripts in their shells.
func TestCompletionScripts(t *testing.T) {
	for shell, ask := range map[string]string{
		// As readline does for "complete -C", run the command with the line.
		"bash": `source <(migrated completion bash); complete -p migrated | ` +
			`grep -qE -- "-C '?migrated'? migrated" && COMP_LINE="migrated mi" COMP_POINT=11 migrated`,
		"zsh": `autoload -Uz compinit && compinit -D; source <(migrated completion zsh); ` +
			`whence -f _bash_complete >/dev/null &&
			[[ $_comps[migrated] == *_bash_complete* ]] && COMP_LINE="migrated mi" COMP_POINT=11 migrated`,
		"fish": `migrated completion fish | source; complete -C "migrated mi" | cut -f 1`,
	} {
		t.Run(shell, func(t *testing.T) {
			if _, err := exec.LookPath(shell); err != nil {
				if os.Getenv("CI") == "true" {
					t.Fatalf("%s is needed: %v", shell, err)
				}
				t.Skipf("%s is not installed", shell)
			}
			command := exec.Command(shell, "-c", ask)
			command.Env = append(os.Environ(), "HOME="+t.TempDir())
			out, err := command.CombinedOutput()
			if got := strings.TrimSpace(string(out)); err != nil || got != "migrate" {
				t.Errorf("proposes %q (%v), want migrate", got, err)
			}
		})
	}
}
