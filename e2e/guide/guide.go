// SPDX-License-Identifier: Apache-2.0

// Package guide reads the commands that the documentation tells its readers to type, so that tests run them exactly as
// written.
//
// Commands are in a fenced block of the language sh, which is a script, or console, whose commands have a prompt: "$ ",
// or "host-a# " to name the host. An HTML comment in the line above says what is done with the block:
//
//	<!-- run by TestTutorial on host-a -->
//	<!-- not run: it needs two machines with SELinux -->
//
// The test of that name gets the block from [Page.RunBy], and runs it.
package guide

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"mvdan.cc/sh/v3/syntax"

	"github.com/migrated-vm/migrated/e2e/checkout"
)

// pages are patterns for the files of the documentation, below the checkout.
var pages = []string{"*.md", "docs/*.md", "deploy/*.md", "deploy/*/*.md", "kernel/*.md"}

// A Page is a file of the documentation.
type Page struct {
	Path   string // below the checkout
	Blocks []Block
	Inline []Inline
}

// A Block is code in a page.
type Block struct {
	Line     int    // of its first line of code
	Language string // of the fence; "": none, or no fence
	Text     string
	RunBy    string // the test that runs it
	On       string // a further word for that test, such as "host-a"
	NotRun   string // why no test runs it
}

// Inline is code within a text.
type Inline struct {
	Line int
	Text string
}

// Read reads a page. path is below the checkout.
func Read(path string) (Page, error) {
	root, err := checkout.Root()
	if err != nil {
		return Page{}, err
	}
	text, err := os.ReadFile(filepath.Join(root, path))
	if err != nil {
		return Page{}, err
	}
	page, err := parse(string(text))
	page.Path = path
	if err != nil {
		return Page{}, fmt.Errorf("%s:%w", path, err)
	}
	return page, nil
}

// All reads all pages.
func All() (all []Page, err error) {
	root, err := checkout.Root()
	if err != nil {
		return nil, err
	}
	for _, pattern := range pages {
		paths, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			return nil, err
		}
		for _, path := range paths {
			page, err := Read(strings.TrimPrefix(path, root+"/"))
			if err != nil {
				return nil, err
			}
			all = append(all, page)
		}
	}
	return all, nil
}

var (
	fence  = regexp.MustCompile("^```([a-z]*)$")
	mark   = regexp.MustCompile(`^<!-- (?:run by (Test\w+)(?: on ([\w-]+))?|not run: (.+)) -->$`)
	inline = regexp.MustCompile("`([^`]+)`")
)

// parse splits a page.
func parse(text string) (p Page, err error) {
	lines := strings.Split(text, "\n")
	for i := 0; i < len(lines); i++ {
		opening := fence.FindStringSubmatch(lines[i])
		indented := strings.HasPrefix(lines[i], "    ") && (i == 0 || lines[i-1] == "")
		switch {
		case opening != nil:
			end := i + 1 + slices.Index(lines[i+1:], "```")
			if end == i {
				return p, fmt.Errorf("%d: a block of code has no end", i+1)
			}
			b := Block{Line: i + 2, Language: opening[1], Text: strings.Join(lines[i+1:end], "\n")}
			if i > 0 {
				if said := mark.FindStringSubmatch(lines[i-1]); said != nil {
					b.RunBy, b.On, b.NotRun = said[1], said[2], said[3]
				} else if strings.HasPrefix(lines[i-1], "<!--") {
					return p, fmt.Errorf("%d: %q says nothing of the block", i, lines[i-1])
				}
			}
			p.Blocks = append(p.Blocks, b)
			i = end
		case indented:
			end := i
			for end < len(lines) && (lines[end] == "" || strings.HasPrefix(lines[end], "    ")) {
				end++
			}
			var code []string
			for _, line := range lines[i:end] {
				code = append(code, strings.TrimPrefix(line, "    "))
			}
			p.Blocks = append(p.Blocks, Block{Line: i + 1, Text: strings.TrimRight(strings.Join(code, "\n"), "\n")})
			i = end - 1
		default:
			for _, m := range inline.FindAllStringSubmatch(lines[i], -1) {
				p.Inline = append(p.Inline, Inline{i + 1, m[1]})
			}
		}
	}
	return p, nil
}

// RunBy returns the blocks that a test of that name runs. It is an error if there are none, because the page has lost
// them.
func (p Page) RunBy(test string) (blocks []Block, err error) {
	for _, b := range p.Blocks {
		if b.RunBy == test {
			blocks = append(blocks, b)
		}
	}
	if len(blocks) == 0 {
		return nil, fmt.Errorf("%s has no commands for %s", p.Path, test)
	}
	return blocks, nil
}

// HasCommands reports whether the block is for a shell.
func (b Block) HasCommands() bool { return b.Language == "sh" || b.Language == "console" }

// A Command is the text typed at one prompt, or a script.
type Command struct {
	Host string // of the prompt: host-a; "": none
	Text string
}

var prompt = regexp.MustCompile(`^(?:\$|(host-[ab])#) (.*)$`)

// Commands returns the commands of a block: a script as one, a console's one by one.
func (b Block) Commands() (commands []Command) {
	if b.Language != "console" {
		return []Command{{b.On, b.Text}}
	}
	for line := range strings.Lines(b.Text) {
		if typed := prompt.FindStringSubmatch(strings.TrimSuffix(line, "\n")); typed != nil {
			commands = append(commands, Command{typed[1], typed[2]})
		}
	}
	return commands
}

// Calls returns the arguments of each call of a program, anywhere in a script. A word whose value is only known at run
// time stays as written. A script that does not parse is an error.
func Calls(script, program string) (calls [][]string, err error) {
	file, err := syntax.NewParser().Parse(strings.NewReader(script), "")
	if err != nil {
		return nil, err
	}
	printer := syntax.NewPrinter()
	syntax.Walk(file, func(node syntax.Node) bool {
		call, ok := node.(*syntax.CallExpr)
		if !ok || len(call.Args) == 0 || call.Args[0].Lit() != program {
			return true
		}
		var words []string
		for _, word := range call.Args[1:] {
			words = append(words, wordText(printer, word))
		}
		calls = append(calls, words)
		return true
	})
	return calls, nil
}

// wordText returns a word as a program gets it, without quotes.
func wordText(printer *syntax.Printer, word *syntax.Word) string {
	var text strings.Builder
	parts := word.Parts
	for len(parts) > 0 {
		part := parts[0]
		parts = parts[1:]
		switch p := part.(type) {
		case *syntax.Lit:
			text.WriteString(p.Value)
		case *syntax.SglQuoted:
			text.WriteString(p.Value)
		case *syntax.DblQuoted:
			parts = append(slices.Clone(p.Parts), parts...)
		default:
			_ = printer.Print(&text, part)
		}
	}
	return text.String()
}
