// SPDX-License-Identifier: Apache-2.0

package cmdline

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"text/template"
)

// maxTemplate is the maximum size of a template in bytes. It is far more than a command line with comments needs.
const maxTemplate = 256 << 10

// templateName matches the allowed names of templates.
var templateName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

// readTemplate reads a template that another host has named. It reads only files in dir, this host's directory of
// templates. name is a file name, or a path in dir: older sources send the path.
func readTemplate(dir, name string) (string, error) {
	if dir == "" {
		return "", errors.New("the destination has no templates: its template_dir is empty")
	}
	if filepath.IsAbs(name) && filepath.Dir(filepath.Clean(name)) == filepath.Clean(dir) {
		name = filepath.Base(name)
	}
	if !templateName.MatchString(name) {
		return "", fmt.Errorf("%.100q is no name of a file in %s, the template_dir of the destination: "+
			"letters, digits, '.', '_' and '-', at most 64", name, dir)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return "", err
	}
	defer root.Close()
	// Without O_NONBLOCK, opening a FIFO would wait for its writer.
	file, err := root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return "", err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() {
		return "", fmt.Errorf("%s in %s is no regular file", name, dir)
	}
	text, err := io.ReadAll(io.LimitReader(file, maxTemplate+1))
	if err == nil && len(text) > maxTemplate {
		err = fmt.Errorf("%s in %s is longer than %d bytes", name, dir, maxTemplate)
	}
	return string(text), err
}

// templateData is the data of a command line template.
type templateData struct {
	Name string   // of the VM
	QMP  string   // where the daemon expects the destination's QMP socket
	Args []string // the source's command line, argv[0] first
}

// expand makes a command line from a template. Each line of the output is one argument, without the blanks around it.
// Empty lines and lines that begin with '#' are left out. Besides the functions of text/template there is {{replace OLD
// NEW TEXT}}:
//
//	{{range .Args}}{{replace "/dev/shm/" "/dev/hugepages/" .}}
//	{{end}}
//
// A template may keep the options that Destination replaces: Destination also changes the output of expand.
func expand(source Source, opts Options) ([]string, error) {
	text, err := readTemplate(opts.TemplateDir, opts.Template)
	if err != nil {
		return nil, fmt.Errorf("template of the destination's command line: %w", err)
	}
	functions := template.FuncMap{
		"replace": func(old, by, text string) string { return strings.ReplaceAll(text, old, by) },
	}
	t, err := template.New(filepath.Base(opts.Template)).Funcs(functions).Option("missingkey=error").Parse(text)
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
		return nil, fmt.Errorf("template of the destination's command line: %s made no argument", opts.Template)
	}
	return args, nil
}
