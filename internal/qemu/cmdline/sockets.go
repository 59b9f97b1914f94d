// SPDX-License-Identifier: Apache-2.0

package cmdline

import (
	"path/filepath"
	"slices"
	"strings"
)

// socketOptions are QEMU's options whose value may name a Unix socket at which QEMU listens.
var socketOptions = []string{
	"qmp", "qmp-pretty", "monitor", "serial", "parallel", "debugcon", "virtioconsole", "vnc", "chardev", "netdev", "nic",
	"gdb",
}

// Sockets returns the paths of the Unix sockets at which QEMU listens: monitors, character devices, VNC and networks.
// dir is the directory in which QEMU was started. At its start QEMU removes an existing file at such a path, even when
// another process listens there.
func (l Line) Sockets(dir string) (paths []string) {
	for _, o := range l {
		if !slices.Contains(socketOptions, o.name) {
			continue
		}
		settings := parseSettings(o.value)
		path, isUnix := strings.CutPrefix(o.value, "unix:")
		if isUnix {
			path, _, _ = strings.Cut(path, ",")
		} else {
			path = get(settings, "path") + get(settings, "addr.path")
		}
		if path == "" || o.name != "vnc" && !isServer(settings) {
			continue
		}
		if !filepath.IsAbs(path) {
			path = filepath.Join(dir, path)
		}
		paths = append(paths, path)
	}
	return paths
}

// Monitors returns the paths of the Unix sockets at which QEMU answers QMP. dir is the directory in which QEMU was
// started.
func (l Line) Monitors(dir string) (paths []string) {
	add := func(path string) {
		if !filepath.IsAbs(path) {
			path = filepath.Join(dir, path)
		}
		paths = append(paths, path)
	}
	for _, o := range l {
		switch o.name {
		case "qmp", "qmp-pretty":
			if path, isUnix := strings.CutPrefix(o.value, "unix:"); isUnix {
				path, _, _ = strings.Cut(path, ",")
				if isServer(parseSettings(o.value)) {
					add(path)
				}
			}
		case "chardev":
			settings := parseSettings(o.value)
			path := get(settings, "path")
			if settings[0].key == "socket" && path != "" && isServer(settings) && isControl(l, get(settings, "id")) {
				add(path)
			}
		}
	}
	return paths
}

// isServer reports whether QEMU listens at a socket: "server", "server=on" or an older spelling of it.
func isServer(settings []setting) bool {
	server := false
	for _, s := range settings {
		if s.key == "server" {
			server = s.word || s.value == "on" || s.value == "yes" || s.value == "true" || s.value == "y"
		}
	}
	return server
}

// isControl reports whether a monitor in control mode (QMP) uses the character device id.
func isControl(options []option, id string) bool {
	for _, o := range options {
		switch o.name {
		case "mon":
			settings := parseSettings(o.value)
			device := get(settings, "chardev")
			if settings[0].word { // the key chardev may be left out
				device = settings[0].key
			}
			if device == id && get(settings, "mode") == "control" {
				return true
			}
		case "qmp", "qmp-pretty":
			if o.value == "chardev:"+id {
				return true
			}
		}
	}
	return false
}
