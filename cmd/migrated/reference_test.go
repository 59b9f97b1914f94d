// SPDX-License-Identifier: Apache-2.0

package main

import (
	"flag"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/alecthomas/kong"
)

//go:generate go test -trimpath -vet=off -count=1 -run ^TestReference$ . -update

var update = flag.Bool("update", false, "write docs/cli.md anew")

// TestReference compares docs/cli.md with the model of the command line, from which --help and the manual pages are
// made as well.
func TestReference(t *testing.T) {
	const path = "../../docs/cli.md"
	var c cli
	parser, err := newParser(&c, io.Discard, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	want := reference(parser.Model.Node)
	if *update {
		if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Errorf("%s is not what the command line's model says: make generate", path)
	}
}

// reference returns docs/cli.md.
func reference(root *kong.Node) string {
	var p markdown
	p.line("<!-- Made by 'make generate' of the program's own command line (cmd/migrated/cli.go). Do not edit. -->")
	p.line("# The command line")
	p.line("")
	p.prose(description)
	p.line("")
	p.line("`migrated COMMAND --help` and `man migrated-COMMAND` say the same as this page.")
	p.line("")
	p.line("| command | |")
	p.line("|---|---|")
	commands := root.Leaves(true)
	for _, command := range commands {
		name := command.FullPath()
		p.linef("| [`%s`](#%s) | %s |", name, strings.ReplaceAll(name, " ", "-"), cell(command.Help))
	}
	p.line("")
	p.line("## Flags of all commands")
	p.line("")
	p.flags(root.Flags, "common")
	p.line("For what crosses a network: with `serve` of its listening, and of its connections to other daemons; " +
		"with all else of the connection to the daemon.")
	p.line("")
	p.flags(root.Flags, "tls")
	p.line("## Exit codes")
	p.line("")
	p.line("| code | |")
	p.line("|---|---|")
	for _, e := range exitCodes {
		p.linef("| %d | %s |", e.code, cell(e.meaning))
	}
	for _, command := range commands {
		p.command(command)
	}
	// Each part ends with an empty line, and some begin with one.
	return strings.TrimRight(emptyLines.ReplaceAllString(p.String(), "\n\n"), "\n") + "\n"
}

var emptyLines = regexp.MustCompile(`\n{3,}`)

// markdown is a page in Markdown.
type markdown struct{ strings.Builder }

func (p *markdown) line(text string)                 { p.WriteString(text + "\n") }
func (p *markdown) linef(format string, args ...any) { p.line(fmt.Sprintf(format, args...)) }

// command writes the section of a command.
func (p *markdown) command(command *kong.Node) {
	name := command.FullPath()
	p.line("")
	p.linef("## %s", name)
	p.line("")
	synopsis := []string{name}
	if len(command.Flags) > 0 {
		synopsis = append(synopsis, "[OPTION]...")
	}
	for _, argument := range command.Positional {
		synopsis = append(synopsis, argument.Summary())
	}
	p.linef("Usage: %s", escaped(strings.Join(synopsis, " ")))
	p.line("")
	p.prose(command.Detail)
	p.line("")
	if len(command.Positional) > 0 {
		p.line("| argument | |")
		p.line("|---|---|")
		for _, argument := range command.Positional {
			p.linef("| `%s` | %s |", argument.Summary(), cell(argument.Help))
		}
		p.line("")
	}
	var own, settings bool
	for _, flag := range command.Flags {
		settings = settings || groupOf(flag) == "settings"
		own = own || groupOf(flag) == ""
	}
	if own {
		p.flags(command.Flags, "")
	}
	if settings {
		p.line("These override the key of that name in the configuration file ([configuration.md](configuration.md)):")
		p.line("")
		p.flags(command.Flags, "settings")
	}
}

// prose writes a help text, with its indented examples as code.
func (p *markdown) prose(text string) {
	var examples []string
	flush := func() {
		if len(examples) > 0 {
			p.line("<!-- run by TestHelpExamples -->")
			p.linef("```sh\n%s\n```", strings.Join(examples, "\n\n"))
			p.line("")
			examples = nil
		}
	}
	paragraphs := strings.Split(text, "\n\n")
	for i, paragraph := range paragraphs {
		if strings.HasPrefix(paragraph, "    ") {
			var lines []string
			for line := range strings.Lines(paragraph) {
				lines = append(lines, strings.TrimPrefix(strings.TrimSuffix(line, "\n"), "    "))
			}
			examples = append(examples, strings.Join(lines, "\n"))
			continue
		}
		flush()
		p.line(escaped(paragraph))
		if i < len(paragraphs)-1 {
			p.line("")
		}
	}
	flush()
}

func groupOf(flag *kong.Flag) string {
	if flag.Group == nil {
		return ""
	}
	return flag.Group.Key
}

// flags writes a table of the flags of a group.
func (p *markdown) flags(flags []*kong.Flag, group string) {
	p.line("| flag | default | |")
	p.line("|---|---|---|")
	for _, flag := range flags {
		if flag.Hidden || groupOf(flag) != group {
			continue
		}
		name := "--" + flag.Name
		if flag.Short != 0 {
			name = "-" + string(flag.Short) + ", " + name
		}
		if !flag.IsBool() {
			name += "=" + flag.FormatPlaceHolder()
		}
		help := cell(flag.Help)
		for _, variable := range flag.Envs {
			help += " Environment variable: `" + variable + "`."
		}
		fallback := ""
		if flag.Default != "" {
			fallback = "`" + flag.Default + "`"
			help = strings.Replace(help, " (default: "+cell(flag.Default)+")", "", 1)
		}
		p.linef("| `%s` | %s | %s |", strings.ReplaceAll(name, "|", `\|`), fallback, help)
	}
	p.line("")
}

// escaped escapes a text for Markdown.
func escaped(text string) string {
	return strings.NewReplacer("*", `\*`, "<", `\<`, "`", "\\`").Replace(text)
}

// cell returns a text as the cell of a table.
func cell(text string) string {
	return strings.ReplaceAll(strings.ReplaceAll(escaped(text), "|", `\|`), "\n", " ")
}

// TestExitCodesStay: scripts depend on the exit codes. A new one is added here, and none is changed.
func TestExitCodesStay(t *testing.T) {
	promised := map[int]int{
		exitOK: 0, exitFailed: 1, exitUsage: 2, exitUnreachable: 3, exitCheck: 4, exitCancelled: 5, exitUnknownID: 6,
		exitEnded: 7, exitUnderWay: 8, exitStillHere: 9, exitConfig: 78, exitInterrupted: 130,
	}
	for code, want := range promised {
		if code != want {
			t.Errorf("exit code %d is %d now", want, code)
		}
	}
	for _, e := range exitCodes {
		if _, known := promised[e.code]; !known {
			t.Errorf("exit code %d (%s) is not promised", e.code, e.meaning)
		}
	}
	if len(exitCodes) != len(promised) {
		t.Errorf("%d exit codes are explained, %d are promised", len(exitCodes), len(promised))
	}
}
