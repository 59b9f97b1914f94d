// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"text/template"
)

// templateData is what a template of a command line sees.
type templateData struct {
	Name string   // of the VM
	QMP  string   // where the daemon expects the destination's QMP socket
	Args []string // the source's command line, argv[0] first
}

// expand makes a command line from a template. Each line of the output is one argument; empty lines and
// lines that begin with '#' are left out, blanks around an argument are not part of it. Besides text/template's
// own functions there is {{replace OLD NEW TEXT}}:
//
//	{{range .Args}}{{replace "/dev/shm/" "/dev/hugepages/" .}}
//	{{end}}
//
// What DestinationCommand replaces, it replaces in the output too, so the template need not care.
func expand(path string, source SourceCommand, opts CommandOptions) ([]string, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("template of the destination's command line: %w", err)
	}
	functions := template.FuncMap{"replace": func(old, by, text string) string { return strings.ReplaceAll(text, old, by) }}
	t, err := template.New(filepath.Base(path)).Funcs(functions).Option("missingkey=error").Parse(string(text))
	if err != nil {
		return nil, fmt.Errorf("template of the destination's command line: %w", err)
	}
	for _, arg := range source.Args {
		if strings.ContainsAny(arg, "\r\n") {
			return nil, fmt.Errorf("template of the destination's command line: the source's argument %q has several lines, "+
				"a template makes one argument of each line", arg)
		}
	}
	var out strings.Builder
	if err := t.Execute(&out, templateData{Name: source.Name, QMP: opts.QMPPath, Args: source.Args}); err != nil {
		return nil, fmt.Errorf("template of the destination's command line: %w", err)
	}
	var args []string
	for line := range strings.Lines(out.String()) {
		if arg := strings.TrimSpace(line); arg != "" && !strings.HasPrefix(arg, "#") {
			args = append(args, arg)
		}
	}
	if len(args) == 0 {
		return nil, fmt.Errorf("template of the destination's command line: %s made no argument", path)
	}
	return args, nil
}
