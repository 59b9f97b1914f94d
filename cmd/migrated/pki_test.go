// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/e2e/guide"
	"github.com/migrated-vm/migrated/internal/pki"
)

// TestCertificatesGuide runs the commands of docs/certificates.md, and checks the files that they make.
func TestCertificatesGuide(t *testing.T) {
	page, err := guide.Read("docs/certificates.md")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	runGuide(t, page, dir)
	for _, name := range []string{"host-a", "host-b", "alice"} {
		if err := pki.FilesIn(filepath.Join(dir, "pki", name)).Check(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	// The guide has the lines that issue prints.
	issue := exec.CommandContext(t.Context(), "migrated", "pki", "issue", "host-c")
	issue.Dir = dir
	out, err := issue.Output()
	if err != nil {
		t.Fatal(err)
	}
	told := 0
	for line := range strings.Lines(string(out)) {
		if !strings.HasPrefix(line, "tls_") {
			continue
		}
		told++
		if !slices.ContainsFunc(page.Blocks, func(b guide.Block) bool {
			return strings.Contains("\n"+b.Text+"\n", "\n"+line)
		}) {
			t.Errorf("the guide lacks %q", line)
		}
	}
	if told != 3 {
		t.Errorf("issue prints %d lines for the configuration: %s", told, out)
	}
}

// runGuide runs the commands of a page that are marked for this test, in a directory.
func runGuide(t *testing.T, page guide.Page, dir string, environment ...string) {
	t.Helper()
	blocks, err := page.RunBy(t.Name())
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range blocks {
		for _, c := range b.Commands() {
			sh := exec.CommandContext(t.Context(), "sh", "-ec", c.Text)
			sh.Dir, sh.Env = dir, append(os.Environ(), environment...)
			if out, err := sh.CombinedOutput(); err != nil {
				t.Fatalf("%s:%d: %s: %v\n%s", page.Path, b.Line, c.Text, err, out)
			}
		}
	}
}

// TestReportGuide runs the commands of docs/report.md.
func TestReportGuide(t *testing.T) {
	page, err := guide.Read("docs/report.md")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	socket := filepath.Join(dir, "d.sock")
	d, err := startPlayed(socket)
	if err != nil {
		t.Fatal(err)
	}
	defer d.stop()
	runGuide(t, page, dir, "MIGRATED_DAEMON=unix://"+socket)
	made, err := os.ReadFile(filepath.Join(dir, "db-1.html"))
	if err != nil || !strings.Contains(string(made), "</html>") {
		t.Errorf("the page is %q, %v", made, err)
	}
}
