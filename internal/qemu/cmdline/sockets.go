// SPDX-License-Identifier: Apache-2.0

package cmdline

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// socketOptions are QEMU's options whose value may name a Unix socket at which QEMU listens, besides -display vnc=.
var socketOptions = []string{
	"qmp", "qmp-pretty", "monitor", "serial", "parallel", "debugcon", "virtioconsole", "vnc", "spice", "chardev",
	"netdev", "nic", "gdb",
}

// Sockets returns the paths of the Unix sockets at which QEMU listens: monitors, character devices, displays and
// networks. dir is the directory in which QEMU was started. At its start QEMU removes an existing file at such a path,
// even when another process listens there. Sockets fails where it cannot read an option as QEMU may.
func (l Line) Sockets(dir string) (paths []string, err error) {
	for _, o := range l {
		path, err := l.socket(o, dir)
		if err != nil {
			return nil, err
		}
		if path != "" {
			paths = append(paths, path)
		}
	}
	return paths, nil
}

// socket returns the path of the Unix socket at which QEMU listens because of one option, or "".
func (l Line) socket(o option, dir string) (path string, err error) {
	if display, isVNC := strings.CutPrefix(o.value, "vnc="); o.name == "display" && isVNC {
		o = option{name: "vnc", value: display}
	}
	if !slices.Contains(socketOptions, o.name) {
		return "", nil
	}
	settings, err := l.settings(o)
	if err != nil {
		return "", err
	}
	if path = socketIn(o, settings); path != "" && !filepath.IsAbs(path) {
		path = filepath.Join(dir, path)
	}
	return path, nil
}

func socketIn(o option, settings []setting) (path string) {
	switch {
	case o.name == "vnc":
		if address := implied(settings, "vnc"); strings.HasPrefix(address, "unix:") {
			return strings.TrimPrefix(address, "unix:")
		}
	case o.name == "spice":
		if isOn(settings, "unix") {
			return get(settings, "addr")
		}
	case get(settings, "local.path") != "": // for datagrams, which have no server
		return get(settings, "local.path")
	case isOn(settings, "server"):
		// With "mon:", a monitor shares the device.
		if rest, isUnix := strings.CutPrefix(strings.TrimPrefix(o.value, "mon:"), "unix:"); isUnix {
			return implied(parseSettings(rest), "path")
		}
		return get(settings, "path") + get(settings, "addr.path")
	}
	return ""
}

// settings returns the settings of an option, with those that -set adds, and those of all -spice if it is one.
func (l Line) settings(o option) ([]setting, error) {
	if strings.HasPrefix(o.value, "{") {
		var object any
		if err := json.Unmarshal([]byte(o.value), &object); err != nil {
			return nil, fmt.Errorf("the JSON of QEMU's option -%s cannot be read (%w), "+
				"so it is not known whether QEMU would take over the socket of another VM; "+
				"write it with double quotes, with a template of the destination's command line", o.name, err)
		}
		return flatten("", object), nil
	}
	settings := parseSettings(o.value)
	id := get(settings, "id")
	for _, other := range l {
		if target, of := other.setTarget(); target.name == o.name && of == id {
			settings = append(settings, parseSettings(target.value)...)
		}
		if o.name == "spice" && other.name == "spice" {
			settings = append(settings, parseSettings(other.value)...)
		}
	}
	return settings, nil
}

// flatten returns JSON as the settings that say the same: {"addr":{"path":"/x"}} is addr.path=/x.
func flatten(key string, value any) (settings []setting) {
	below := func(name string) string { return strings.TrimPrefix(key+"."+name, ".") }
	switch value := value.(type) {
	case map[string]any:
		for name, v := range value {
			settings = append(settings, flatten(below(name), v)...)
		}
	case []any:
		for i, v := range value {
			settings = append(settings, flatten(below(strconv.Itoa(i)), v)...)
		}
	default:
		settings = append(settings, setting{key: key, value: fmt.Sprint(value)})
	}
	return settings
}

// Monitors returns the paths of the Unix sockets at which QEMU answers QMP. dir is the directory in which QEMU was
// started.
func (l Line) Monitors(dir string) (paths []string) {
	for _, o := range l {
		switch o.name {
		case "qmp", "qmp-pretty":
		case "chardev":
			settings := parseSettings(o.value)
			if settings[0].key != "socket" || !isControl(l, get(settings, "id")) {
				continue
			}
		default:
			continue
		}
		if path, err := l.socket(o, dir); err == nil && path != "" {
			paths = append(paths, path)
		}
	}
	return paths
}

// isOn reports whether a setting is on: "server", "server=on" or an older spelling of it.
func isOn(settings []setting, key string) bool {
	on := false
	for _, s := range settings {
		if s.key == key {
			on = s.word || s.value == "on" || s.value == "yes" || s.value == "true" || s.value == "y"
		}
	}
	return on
}

// isControl reports whether a monitor in control mode (QMP) uses the character device id.
func isControl(options []option, id string) bool {
	for _, o := range options {
		switch o.name {
		case "mon":
			settings := parseSettings(o.value)
			if implied(settings, "chardev") == id && get(settings, "mode") == "control" {
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
