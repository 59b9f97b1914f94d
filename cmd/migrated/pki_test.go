// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/internal/pki"
)

var guideCommand = regexp.MustCompile(`(?m)^\$ (.*)$`)

// TestCertificatesGuide runs the commands of docs/certificates.md: what they make can be used.
func TestCertificatesGuide(t *testing.T) {
	text, err := os.ReadFile("../../docs/certificates.md")
	if err != nil {
		t.Fatal(err)
	}
	commands := guideCommand.FindAllStringSubmatch(string(text), -1)
	if len(commands) < 5 {
		t.Fatalf("the guide has %d commands", len(commands))
	}
	dir := t.TempDir()
	for _, c := range commands {
		sh := exec.CommandContext(t.Context(), "sh", "-c", c[1])
		sh.Dir = dir
		if out, err := sh.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", c[1], err, out)
		}
	}
	for _, name := range []string{"host-a", "host-b", "alice"} {
		if err := pki.FilesIn(filepath.Join(dir, "pki", name)).Check(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	// What issue prints is what the guide says.
	issue := exec.CommandContext(t.Context(), "migrated", "pki", "issue", "host-c")
	issue.Dir = dir
	out, err := issue.Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(out)) {
		if strings.HasPrefix(line, "tls_") && !strings.Contains(string(text), "\n    "+line) {
			t.Errorf("the guide lacks %q", line)
		}
	}
}
