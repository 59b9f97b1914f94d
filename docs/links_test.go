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

// pages are the files of the documentation.
var pages = []string{"../*.md", "*.md", "../deploy/*.md", "../deploy/*/*.md", "../kernel/*.md"}

// readmeMost is how many bytes a first page may have that people read to its end.
const readmeMost = 8 << 10

func TestLinks(t *testing.T) {
	found := 0
	for _, pattern := range pages {
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

// Of Markdown: a test that it names. Of Go: one that there is.
var (
	namedTest   = regexp.MustCompile("`(Test[A-Z][A-Za-z0-9]*)`")
	definedTest = regexp.MustCompile(`(?m)^func (Test[A-Z]\w*)\(`)
)

// TestNamedTestsExist: what the documentation says that a test holds is held by one.
func TestNamedTestsExist(t *testing.T) {
	defined := testSources(t)
	for _, pattern := range pages {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			for _, m := range namedTest.FindAllStringSubmatch(read(t, file), -1) {
				if defined[m[1]] == "" {
					t.Errorf("%s names %s, which there is not", file, m[1])
				}
			}
		}
	}
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

// TestRecording: what README shows of a terminal is small, can be read by who does not see it, and needs nothing from
// elsewhere.
func TestRecording(t *testing.T) {
	const most = 60 << 10
	picture := read(t, "recording.svg")
	if len(picture) > most {
		t.Errorf("it has %d bytes, more than %d", len(picture), most)
	}
	for _, want := range []string{
		"<title", "<desc", "prefers-color-scheme:dark", "prefers-reduced-motion:reduce", "migrated migrate --vm",
	} {
		if !strings.Contains(picture, want) {
			t.Errorf("it has no %s", want)
		}
	}
	if rest := strings.Replace(picture, `xmlns="http://www.w3.org/2000/svg"`, "", 1); strings.Contains(rest, "://") {
		t.Error("it names another place")
	}
	if !strings.Contains(read(t, "../README.md"), "](docs/recording.svg)") {
		t.Error("README.md does not show it")
	}
}
