// SPDX-License-Identifier: Apache-2.0

package cmdline

import (
	"path/filepath"
	"slices"
	"strings"
)

// A Line is a parsed QEMU command line.
type Line []option

// Parse parses a command line, argv[0] first. It fails when an option lacks its value; QEMU would not start then.
func Parse(argv []string) (Line, error) {
	if len(argv) == 0 {
		return nil, nil
	}
	return parseOptions(argv[1:])
}

// Name returns the VM's name from -name, or "" if it has none.
func (l Line) Name() (name string) {
	for _, o := range l {
		if o.name == "name" {
			name = implied(parseSettings(o.value), "guest")
		}
	}
	return name
}

// Incoming reports whether QEMU was started to wait for a VM from another host.
func (l Line) Incoming() bool {
	return slices.ContainsFunc(l, func(o option) bool { return o.name == "incoming" })
}

// PIDFile returns the file to which QEMU writes its PID, or "" if there is none. QEMU removes the file when it ends by
// itself. dir is the directory in which QEMU was started.
func (l Line) PIDFile(dir string) (path string) {
	for _, o := range l {
		if o.name == "pidfile" {
			path = o.value
		}
	}
	if path != "" && !filepath.IsAbs(path) {
		path = filepath.Join(dir, path)
	}
	return path
}

// NoUUID is the UUID of a VM without -uuid.
const NoUUID = "00000000-0000-0000-0000-000000000000"

// UUID returns the VM's UUID from -uuid, or NoUUID.
func UUID(argv []string) string {
	for i, arg := range argv[:max(0, len(argv)-1)] {
		if arg == "-uuid" || arg == "--uuid" {
			return argv[i+1]
		}
	}
	return NoUUID
}

// SwitchesUser reports whether QEMU gives up root at the end of its start and runs as another user (-runas, -run-with
// user=).
func SwitchesUser(argv []string) (bool, error) {
	line, err := Parse(argv)
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(line, func(o option) bool {
		// Like a few other options, -run-with also takes its settings as JSON.
		return o.name == "runas" || o.name == "run-with" &&
			(get(parseSettings(o.value), "user") != "" || strings.HasPrefix(o.value, "{"))
	}), nil
}
