// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/alecthomas/kong"

	"github.com/migrated-vm/migrated/e2e/guide"
)

// quoted matches a command line in a Go file: in a remedy, a help text or a comment.
var quoted = regexp.MustCompile("(?:\\\\?\"|['`])(migrated ([a-z]+)[^\"'`\\\\\n]*)(?:\\\\?\"|['`])")

// runtimeValue matches places in a Go string where an id, or another value, is inserted when the program runs.
var runtimeValue = regexp.MustCompile(`%(\[\d+\])?[sqvd]|" ?\+ ?[\w.]+(\(\))* ?\+ ?"`)

// TestCommandLines: the program accepts every command line in the documentation, in the help texts, and in remedies.
func TestCommandLines(t *testing.T) {
	all, err := guide.All()
	if err != nil {
		t.Fatal(err)
	}
	var c cli
	parser, err := newParser(&c, io.Discard, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	names, checked := commandNames(t, parser), commandLines{}
	found := 0
	check := func(where, script string) error {
		calls, err := guide.Calls(script, "migrated")
		if err != nil {
			return err
		}
		for _, args := range calls {
			found++
			if err := checked.parse(args); err != nil {
				t.Errorf("%s: migrated %s: %v", where, strings.Join(args, " "), err)
			}
		}
		return nil
	}
	inText := func(where, text string) {
		t.Helper()
		if names[text] {
			found++
			return
		}
		words := strings.Fields(text)
		for _, value := range []string{"VALUE", "KEY=VALUE"} { // for an option that is named without its value
			if strings.HasPrefix(words[len(words)-1], "--") && checked.parse(words[1:]) != nil &&
				checked.parse(append(words[1:], value)) == nil {
				text += " " + value
				break
			}
		}
		if err := check(where, text); err != nil {
			t.Errorf("%s: %v", where, err)
		}
	}
	for _, page := range all {
		for _, b := range page.Blocks {
			if !b.HasCommands() {
				continue
			}
			for _, c := range b.Commands() {
				if err := check(fmt.Sprintf("%s:%d", page.Path, b.Line), c.Text); err != nil {
					t.Errorf("%s:%d: %v", page.Path, b.Line, err)
				}
			}
		}
		for _, code := range page.Inline {
			if !strings.HasPrefix(code.Text, "migrated ") || strings.Contains(code.Text, "COMMAND") {
				continue
			}
			inText(fmt.Sprintf("%s:%d", page.Path, code.Line), code.Text)
		}
	}
	for _, dir := range []string{"..", "../../internal", "../../pkg"} {
		err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
			if err != nil || filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go") {
				return err
			}
			source, err := os.ReadFile(path)
			for _, m := range quoted.FindAllStringSubmatch(runtimeValue.ReplaceAllString(string(source), "ID"), -1) {
				if names["migrated "+m[2]] {
					inText(path, m[1])
				}
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, command := range parser.Model.Leaves(true) {
		for paragraph := range strings.SplitSeq(command.Detail, "\n\n") {
			if strings.HasPrefix(paragraph, "    ") {
				if err := check(command.FullPath()+" --help", paragraph); err != nil {
					t.Errorf("%s --help: %v", command.FullPath(), err)
				}
			}
		}
	}
	if found < 100 {
		t.Errorf("only %d command lines were found", found)
	}
}

// commandNames returns the names of all commands, and of groups of commands. A sentence may name a command without its
// required arguments.
func commandNames(t *testing.T, parser *kong.Kong) map[string]bool {
	t.Helper()
	names := map[string]bool{}
	err := kong.Visit(parser.Model, func(node kong.Visitable, next kong.Next) error {
		if command, ok := node.(*kong.Node); ok {
			names[command.FullPath()] = true
		}
		return next(nil)
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// commandLines remembers the errors of command lines that were parsed.
type commandLines map[string]error

// parse parses a command line, unless it did before. A placeholder counts as a value.
func (k commandLines) parse(args []string) error {
	line := strings.Join(args, "\x00")
	err, found := k[line]
	if !found {
		err = parseOnce(args)
		k[line] = err
	}
	return err
}

// parseOnce parses a command line with a parser of its own, because a parser remembers flags.
func parseOnce(args []string) error {
	var c cli
	parser, err := newParser(&c, io.Discard, io.Discard)
	if err != nil {
		return err
	}
	helped := false
	parser.Exit = func(int) { helped = true; panic(parser) } // after --help or --version
	defer func() {
		if r := recover(); r != nil && !helped {
			panic(r)
		}
	}()
	_, err = parser.Parse(args)
	return err
}
