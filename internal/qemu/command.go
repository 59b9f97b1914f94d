// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// SourceCommand is how the source's QEMU was started.
type SourceCommand struct {
	Name    string   // of the VM
	Args    []string // argv[0] first
	QMPPath string   // the QMP socket that its daemon uses
	Dir     string   // its working directory; may be empty if no path in Args is relative
}

// CommandOptions are what the destination decides.
type CommandOptions struct {
	// QMPPath is where the destination's QEMU listens for us.
	QMPPath string
	// Binaries are patterns (path.Match) of what may be started, because the command line comes from
	// another host. One without a slash is for the base name. Empty: DefaultBinaries.
	Binaries []string
	// Template is the name of a text/template in TemplateDir of the command line to use instead of the source's; see expand.
	Template, TemplateDir string
	// Forbidden are the options that no command line may have; see ParseForbidden.
	Forbidden []string
}

// DestinationCommand makes the argv of a QEMU that waits for the source's VM: the source's argv, with what
// cannot be the same replaced:
//
//   - -incoming, -S, -loadvm, the -loadstate of Proxmox' QEMU and -daemonize give way to -S -incoming defer, without a
//     fork: the daemon watches its child, and a -pidfile has that one's number;
//   - our QMP socket becomes CommandOptions.QMPPath; all other monitors stay.
//
// RAM that is preallocated at the source is so here: QEMU finds out whether this host has the memory, before the VM is
// touched.
//
// The result is for exec: no shell is involved.
func DestinationCommand(source SourceCommand, opts CommandOptions) ([]string, error) {
	args := source.Args
	if opts.Template != "" {
		var err error
		if args, err = expand(source, opts); err != nil {
			return nil, err
		}
	}
	if len(args) == 0 {
		return nil, errors.New("the command line of the source's QEMU is empty")
	}
	binary, err := findBinary(args[0], opts.Binaries)
	if err != nil {
		return nil, err
	}
	options, err := parseOptions(args[1:])
	if err != nil {
		return nil, err
	}
	if err := checkForbidden(options, opts.Forbidden); err != nil {
		return nil, err
	}
	if err := checkRepeatable(options); err != nil {
		return nil, err
	}
	options, err = adapt(options, source, opts)
	if err != nil {
		return nil, err
	}
	argv := []string{binary}
	for _, o := range options {
		argv = append(argv, o.args()...)
	}
	return append(argv, "-S", "-incoming", "defer"), nil
}

// inherited finds descriptors that QEMU was given by whoever started it.
var inherited = regexp.MustCompile(`(^|[,"{ ])(fd|fds|vhostfd|vhostfds|sockfd)"?[=:] ?"?[0-9]`)

// checkRepeatable refuses what cannot be started from the command line alone.
func checkRepeatable(options []option) error {
	for _, o := range options {
		switch {
		case o.name == "preconfig":
			return errors.New("the source's QEMU was configured over QMP (-preconfig), so its command line does not describe it; " +
				"start the destination QEMU yourself and name its QMP socket")
		case slices.Contains([]string{"netdev", "chardev", "add-fd", "device"}, o.name) && inherited.MatchString(o.value):
			return fmt.Errorf("the source's QEMU was given open descriptors when it was started (-%s %s), which a command line cannot repeat; "+
				"give a template of the destination's command line, or start the destination QEMU yourself", o.name, o.value)
		}
	}
	return nil
}

// adapt replaces the options that cannot be the same at the destination.
func adapt(options []option, source SourceCommand, opts CommandOptions) ([]option, error) {
	replaceQMP := func(path string) bool {
		if !filepath.IsAbs(path) {
			path = filepath.Join(source.Dir, path)
		}
		path = filepath.Clean(path)
		return path == filepath.Clean(source.QMPPath) || path == filepath.Clean(opts.QMPPath)
	}
	listen := []setting{{key: "server", value: "on"}, {key: "wait", value: "off"}}
	ours := false // one monitor is for us
	var adapted []option
	for _, o := range options {
		switch o.name {
		case "incoming", "S", "loadvm", "loadstate", "daemonize":
			continue
		case "qmp", "qmp-pretty":
			settings := parseSettings(o.value)
			if path, isUnix := strings.CutPrefix(settings[0].key, "unix:"); settings[0].word && isUnix && replaceQMP(path) {
				if ours {
					continue // it listened at both paths; once is enough
				}
				ours = true
				first := setting{key: "unix:" + opts.QMPPath, word: true}
				o = option{name: "qmp", value: joinSettings(append([]setting{first}, listen...))}
			}
		case "chardev":
			settings := parseSettings(o.value)
			if settings[0].key == "socket" && replaceQMP(get(settings, "path")) && isControl(options, get(settings, "id")) {
				if ours {
					return nil, fmt.Errorf("the source's QEMU has two monitors at %s", source.QMPPath)
				}
				ours = true
				path := setting{key: "path", value: opts.QMPPath}
				kept := slices.DeleteFunc(settings, func(s setting) bool {
					return slices.Contains([]string{"path", "server", "wait", "nowait", "nodelay", "reconnect"}, s.key)
				})
				o.value = joinSettings(append(append(kept, path), listen...))
			}
		}
		adapted = append(adapted, o)
	}
	if !ours {
		first := setting{key: "unix:" + opts.QMPPath, word: true}
		adapted = append(adapted, option{name: "qmp", value: joinSettings(append([]setting{first}, listen...))})
	}
	return adapted, nil
}

// isControl tells whether a monitor in control mode, which is QMP, sits on the character device id.
func isControl(options []option, id string) bool {
	for _, o := range options {
		switch o.name {
		case "mon":
			settings := parseSettings(o.value)
			device := get(settings, "chardev")
			if settings[0].word { // chardev is the key that may be left out
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
