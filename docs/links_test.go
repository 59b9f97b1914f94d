// SPDX-License-Identifier: Apache-2.0

// Package docs tests that what the documentation points to is there.
package docs

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"unicode"
)

// Of Markdown: the target of a link in the text, and a heading.
var (
	link    = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading = regexp.MustCompile(`(?m)^#+ (.*)$`)
)

// readmeMost is how many bytes a first page may have that people read to its end.
const readmeMost = 8 << 10

func TestLinks(t *testing.T) {
	found := 0
	for _, pattern := range []string{"../*.md", "*.md", "../deploy/*.md", "../deploy/*/*.md", "../kernel/*.md"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			for _, m := range link.FindAllStringSubmatch(read(t, file), -1) {
				found++
				checkLink(t, file, m[1])
			}
		}
	}
	if found < 50 {
		t.Errorf("only %d links were found", found)
	}
}

func checkLink(t *testing.T, file, target string) {
	t.Helper()
	if strings.Contains(target, "://") {
		return
	}
	path, anchor, _ := strings.Cut(target, "#")
	to := file
	if path != "" {
		to = filepath.Join(filepath.Dir(file), path)
	}
	if _, err := os.Stat(to); err != nil {
		t.Errorf("%s: %v", file, err)
		return
	}
	if anchor == "" || filepath.Ext(to) != ".md" {
		return
	}
	for _, m := range heading.FindAllStringSubmatch(read(t, to), -1) {
		if anchorOf(m[1]) == anchor {
			return
		}
	}
	t.Errorf("%s: %s has no heading #%s", file, to, anchor)
}

// anchorOf is the name that GitHub gives a heading.
func anchorOf(heading string) string {
	var b strings.Builder
	for _, r := range strings.ToLower(heading) {
		switch {
		case r == ' ':
			b.WriteByte('-')
		case unicode.IsLetter(r), unicode.IsDigit(r), r == '-', r == '_':
			b.WriteRune(r)
		}
	}
	return b.String()
}

func TestReadmeIsShort(t *testing.T) {
	if n := len(read(t, "../README.md")); n > readmeMost {
		t.Errorf("README.md has %d bytes, more than %d", n, readmeMost)
	}
}

func read(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
