// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/pkg/testenv"
)

// TestManPages formats each page as man does, and looks for texts that an operator needs.
func TestManPages(t *testing.T) {
	dir := t.TempDir()
	if out, err := exec.CommandContext(t.Context(), "migrated", "man", dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if _, err := exec.LookPath("man"); err != nil {
		testenv.CannotRun(t, "man (package man-db) formats the pages: %v", err)
	}
	pages, err := filepath.Glob(filepath.Join(dir, "*.1"))
	if err != nil {
		t.Fatal(err)
	}
	read := make(map[string]string)
	for _, page := range pages {
		man := exec.CommandContext(t.Context(), "man", "--warnings", "--local-file", page)
		man.Env = append(os.Environ(), "MANWIDTH=80", "LC_ALL=C.UTF-8", "MAN_KEEP_FORMATTING=")
		var said strings.Builder
		man.Stderr = &said
		out, err := man.Output()
		if err != nil || said.String() != "" {
			t.Errorf("%s: %v\n%s", page, err, said.String())
		}
		read[filepath.Base(page)] = string(out)
	}
	for page, wants := range map[string][]string{
		"migrated.1": {
			"migrated - post-copy live migration", "migrated-migrate(1)", "EXIT CODES", "--daemon=ADDR", "MIGRATED_DAEMON",
		},
		"migrated-bandwidth.1": {"migrated-bandwidth - Change how much", "migrated bandwidth [OPTION]...", "EXAMPLE"},
		"migrated-migrate.1":   {"--vm=", "\n           migrated migrate"},
		"migrated-serve.1":     {"--listen=HOST:PORT", "SIGHUP"},
	} {
		for _, want := range wants {
			if !strings.Contains(read[page], want) {
				t.Errorf("%s lacks %q:\n%s", page, want, read[page])
			}
		}
	}
	for page := range read {
		if strings.Contains(page, "start-qemus") || strings.Contains(page, "-man") {
			t.Errorf("%s is of no operator's command", page)
		}
	}
}
