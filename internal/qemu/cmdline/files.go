// SPDX-License-Identifier: Apache-2.0

package cmdline

import (
	"path/filepath"
	"slices"
	"strings"
)

// Files returns the paths of the files that QEMU empties or overwrites when it starts: output and logs of character
// devices, its own log, captures of networks, and its PID file. dir is the directory in which QEMU was started. Files
// fails where it cannot read an option as QEMU may.
func (l Line) Files(dir string) (paths []string, err error) {
	for _, o := range l {
		found, err := l.files(o)
		if err != nil {
			return nil, err
		}
		for _, path := range found {
			if path != "" && !filepath.IsAbs(path) {
				path = filepath.Join(dir, path)
			}
			if path != "" {
				paths = append(paths, path)
			}
		}
	}
	return paths, nil
}

// files returns the paths of one option; some may be empty.
func (l Line) files(o option) (paths []string, err error) {
	switch {
	case o.name == "D", o.name == "pidfile":
		return []string{o.value}, nil
	case o.name == "object", o.name == "trace", slices.Contains(socketOptions, o.name):
	default:
		return nil, nil
	}
	settings, err := l.settings(o)
	if err != nil {
		return nil, err
	}
	switch o.name {
	case "trace":
		return []string{get(settings, "file")}, nil
	case "object":
		if implied(settings, "qom-type") == "filter-dump" {
			return []string{get(settings, "file")}, nil
		}
		return nil, nil
	}
	// QEMU takes all that follows as the path, commas too (qemu_chr_parse_compat in chardev/char.c).
	if path, isFile := strings.CutPrefix(strings.TrimPrefix(o.value, "mon:"), "file:"); isFile {
		return []string{path}, nil
	}
	if !isOn(settings, "logappend") {
		paths = append(paths, get(settings, "logfile"))
	}
	if o.name == "chardev" && implied(settings, "backend") == "file" && !isOn(settings, "append") {
		paths = append(paths, get(settings, "path"))
	}
	return paths, nil
}
