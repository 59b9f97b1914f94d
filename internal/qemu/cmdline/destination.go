// SPDX-License-Identifier: Apache-2.0

package cmdline

import (
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// Source describes how the source's QEMU was started.
type Source struct {
	Name    string   // of the VM
	Args    []string // argv[0] first
	QMPPath string   // the QMP socket that the source's daemon uses
	Dir     string   // working directory; may be empty if no path in Args is relative
	// GenerationID is the id of the device vmgenid, or empty.
	GenerationID string
}

// Options are the destination's own choices.
type Options struct {
	// QMPPath is the path at which the destination's QEMU listens for QMP of this daemon.
	QMPPath string
	// Binaries are the patterns (path.Match) of binaries that may be started, because the command line comes from another
	// host. A pattern without a slash matches the base name. Empty: none is started.
	Binaries []string
	// Template is the name of a text/template in TemplateDir. It makes the command line to use instead of the source's;
	// see expand.
	Template, TemplateDir string
	// Forbidden lists the options that no command line may have; see ParseForbidden.
	Forbidden []string
}

// Destination returns the argv of a QEMU that waits for the source's VM. It is the source's argv with these changes:
//
//   - -S -incoming defer replaces -incoming, -S, -loadvm, -loadstate (Proxmox' QEMU) and -daemonize. QEMU must not
//     fork: the daemon watches its child, and the number in a -pidfile is the child's.
//   - The source's generation id replaces guid=auto, with which QEMU would make another. Another one means to the guest
//     that it is a copy of a VM.
//   - Options.QMPPath replaces the path of the source daemon's QMP socket. All other monitors stay.
//
// RAM that is preallocated at the source is preallocated here, too: QEMU finds out whether this host has enough memory
// before the VM is touched.
//
// The result goes to exec directly, without a shell.
func Destination(source Source, opts Options) ([]string, error) {
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
	binary, err := FindBinary(args[0], opts.Binaries)
	if err != nil {
		return nil, err
	}
	options, err := parseOptions(args[1:])
	if err != nil {
		return nil, err
	}
	if err := checkKnown(options); err != nil {
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

// inherited matches a descriptor that QEMU inherited from the process that started it.
var inherited = regexp.MustCompile(`(^|[,"{ ])(fd|fds|vhostfd|vhostfds|sockfd)"?[=:] ?"?[0-9]`)

// checkRepeatable refuses a QEMU that cannot be started from its command line alone.
func checkRepeatable(options []option) error {
	for _, o := range options {
		switch {
		case o.name == "preconfig":
			return errors.New("the source's QEMU was configured over QMP (-preconfig), " +
				"so its command line does not describe it; start the destination QEMU yourself and name its QMP socket")
		case slices.Contains([]string{"netdev", "chardev", "add-fd", "device"}, o.name) && inherited.MatchString(o.value):
			return fmt.Errorf("the source's QEMU was given open descriptors when it was started (-%s %s), "+
				"which a command line cannot repeat; give a template of the destination's command line, "+
				"or start the destination QEMU yourself", o.name, o.value)
		}
	}
	return nil
}

// adapt replaces the options that cannot be the same at the destination.
func adapt(options []option, source Source, opts Options) ([]option, error) {
	replaceQMP := func(path string) bool {
		if !filepath.IsAbs(path) {
			path = filepath.Join(source.Dir, path)
		}
		path = filepath.Clean(path)
		return path == filepath.Clean(source.QMPPath) || path == filepath.Clean(opts.QMPPath)
	}
	listen := []setting{{key: "server", value: "on"}, {key: "wait", value: "off"}}
	ours := false // a monitor at QMPPath exists
	var adapted []option
	for _, o := range options {
		switch o.name {
		case "incoming", "S", "loadvm", "loadstate", "daemonize":
			continue
		case "device":
			o.value = keepGeneration(o.value, source.GenerationID)
		case "qmp", "qmp-pretty":
			settings := parseSettings(o.value)
			if path, isUnix := strings.CutPrefix(settings[0].key, "unix:"); settings[0].word && isUnix && replaceQMP(path) {
				if ours {
					continue // the source listened at both paths; one monitor is enough
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

// autoGUID matches the setting of the device vmgenid that has QEMU make a new id, also in JSON.
var autoGUID = regexp.MustCompile(`((?:^|,)guid=|"guid": ?")auto(,|"|$)`)

// keepGeneration puts id in place of guid=auto, in the value of -device.
func keepGeneration(device, id string) string {
	if id == "" || !strings.Contains(device, "vmgenid") {
		return device
	}
	return autoGUID.ReplaceAllString(device, "${1}"+id+"${2}")
}
