// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/alecthomas/kong"
)

// manCmd is for building packages: it writes a manual page for this program, and one for each command.
type manCmd struct {
	Directory string `arg:"" type:"existingdir" help:"Where the pages are written."`
}

func (m *manCmd) Run(_ *app, root *kong.Node) error {
	for _, node := range append([]*kong.Node{root}, root.Leaves(true)...) {
		page := manPage{root: root, node: node}
		path := filepath.Join(m.Directory, page.name()+".1")
		if err := os.WriteFile(path, []byte(page.text()), 0o644); err != nil {
			return fmt.Errorf("writing a manual page: %w", err)
		}
	}
	return nil
}

// A manPage is the manual page of the program or of a command, written with the macros of man(7).
type manPage struct {
	root, node *kong.Node
	strings.Builder
}

// name returns the name of the page: "migrated-bandwidth".
func (p *manPage) name() string { return strings.ReplaceAll(p.node.FullPath(), " ", "-") }

func (p *manPage) macro(name, text string) {
	fmt.Fprintf(p, ".%s %s\n", name, roff(text))
}

func (p *manPage) text() string {
	detail, short := p.node.Detail, p.node.Help
	if p.node == p.root { // its help text is the description
		detail, short = short, "post-copy live migration of QEMU virtual machines"
	}
	fmt.Fprintf(p, ".TH %s 1 \"\" %q\n", strings.ToUpper(p.name()), "migrated")
	fmt.Fprintln(p, ".nh\n.ad l") // no hyphenation, so that names of options and files stay whole
	p.macro("SH", "NAME")
	fmt.Fprintf(p, "%s \\- %s\n", roff(p.name()), roff(strings.TrimSuffix(short, ".")))
	p.macro("SH", "SYNOPSIS")
	p.macro("B", p.node.FullPath())
	fmt.Fprintln(p, roff(p.operands()))
	p.macro("SH", "DESCRIPTION")
	p.prose(detail)
	if p.node == p.root {
		p.commands()
	}
	if len(p.node.Positional) > 0 {
		p.macro("SH", "ARGUMENTS")
		for _, argument := range p.node.Positional {
			p.item(argument.Summary(), argument.Help)
		}
	}
	if len(p.node.Flags) > 0 {
		p.macro("SH", "OPTIONS")
		for _, flag := range p.node.Flags {
			p.flag(flag)
		}
	}
	p.macro("SH", "SEE ALSO")
	if p.node == p.root {
		fmt.Fprintln(p, "/usr/share/doc/migrated/README.md, /etc/migrated/migrated.yaml")
	} else {
		fmt.Fprintln(p, ".BR migrated (1),\nwhich has the options of all commands and the exit codes")
	}
	return p.String()
}

// operands returns what follows the command in the synopsis.
func (p *manPage) operands() string {
	if p.node == p.root {
		return "COMMAND [OPTION]..."
	}
	words := []string{"[OPTION]..."}
	for _, argument := range p.node.Positional {
		words = append(words, argument.Summary())
	}
	return strings.Join(words, " ")
}

// prose writes the paragraphs of a help text. An indented paragraph is an example, and a line that ends with a colon is
// a heading.
func (p *manPage) prose(text string) {
	for _, paragraph := range strings.Split(text, "\n\n") {
		switch heading, isHeading := strings.CutSuffix(paragraph, ":"); {
		case isHeading && !strings.ContainsAny(heading, "\n.:"):
			p.macro("SH", strings.ToUpper(heading))
		case strings.HasPrefix(paragraph, "    "):
			fmt.Fprintln(p, ".PP\n.nf\n.RS 4")
			for line := range strings.Lines(paragraph) {
				fmt.Fprintln(p, roff(strings.TrimPrefix(strings.TrimSuffix(line, "\n"), "    ")))
			}
			fmt.Fprintln(p, ".RE\n.fi")
		default:
			fmt.Fprintln(p, ".PP")
			for line := range strings.Lines(paragraph) {
				fmt.Fprintln(p, roff(strings.TrimSuffix(line, "\n")))
			}
		}
	}
}

// commands lists the commands, which have pages of their own.
func (p *manPage) commands() {
	p.macro("SH", "COMMANDS")
	for _, command := range p.root.Leaves(true) {
		page := manPage{root: p.root, node: command}
		fmt.Fprintf(p, ".TP\n.BR %s (1)\n%s\n", roff(page.name()), roff(command.Help))
	}
}

func (p *manPage) flag(flag *kong.Flag) {
	if flag.Hidden {
		return
	}
	name := "--" + flag.Name
	if flag.Short != 0 {
		name = "-" + string(flag.Short) + ", " + name
	}
	if !flag.IsBool() {
		name += "=" + flag.FormatPlaceHolder()
	}
	help := flag.Help
	for _, variable := range flag.Envs {
		help += " Environment variable: " + variable + "."
	}
	p.item(name, help)
}

func (p *manPage) item(name, help string) {
	fmt.Fprintf(p, ".TP\n.B %s\n%s\n", roff(name), roff(help))
}

// roff escapes a line of text for the formatter.
func roff(text string) string {
	text = strings.NewReplacer(`\`, `\e`, "-", `\-`).Replace(text)
	if strings.HasPrefix(text, ".") || strings.HasPrefix(text, "'") {
		text = `\&` + text
	}
	return text
}
