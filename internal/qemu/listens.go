// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// socketOptions are those of QEMU's options whose value may be a Unix socket of its own.
var socketOptions = []string{
	"qmp", "qmp-pretty", "monitor", "serial", "parallel", "debugcon", "virtioconsole", "vnc", "chardev", "netdev", "nic",
	"gdb",
}

// listensAt are the Unix sockets that a QEMU with that command line, argv[0] first, makes: of monitors, character
// devices, VNC and networks. It removes what has such a name, whoever listens there.
func listensAt(argv []string, dir string) (paths []string) {
	if len(argv) == 0 {
		return nil
	}
	options, err := parseOptions(argv[1:])
	if err != nil {
		return nil // such a QEMU does not start
	}
	for _, o := range options {
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

// isServer says whether a socket is one that QEMU listens at: "server", "server=on" or an older spelling of it.
func isServer(settings []setting) bool {
	server := false
	for _, s := range settings {
		if s.key == "server" {
			server = s.word || s.value == "on" || s.value == "yes" || s.value == "true" || s.value == "y"
		}
	}
	return server
}

// checkUnused refuses a socket at which somebody listens: QEMU would take the name away from whom it belongs to,
// another VM perhaps.
func checkUnused(path string) error {
	conn, err := net.Dial("unix", path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil // nobody listens; a socket file that was left behind is replaced by QEMU
	}
	if err != nil {
		return fmt.Errorf("where the destination's QEMU is to listen: %w", err)
	}
	conn.Close()
	return fmt.Errorf("another process listens at %s, where the destination's QEMU is to listen: "+
		"end it, or give the destination another path with a template", path)
}
