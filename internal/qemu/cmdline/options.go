// SPDX-License-Identifier: Apache-2.0

package cmdline

import (
	"fmt"
	"slices"
	"strings"
)

// An option is one of QEMU's command line options with its value. A bare argument (a disk image) is an option without a
// name.
type option struct {
	name  string // without dashes
	value string
	bare  bool // has no value
}

// parseOptions parses QEMU's arguments, without argv[0], as QEMU does (qemu_init in softmmu/vl.c): an option begins
// with one dash or two, and its value is the next argument, even if that looks like an option: "-append -S" contains no
// -S.
//
// An option that is not known is taken as one without a value if what follows looks like an option; see checkKnown.
func parseOptions(args []string) ([]option, error) {
	var options []option
	for i := 0; i < len(args); i++ {
		arg := args[i]
		if !strings.HasPrefix(arg, "-") || arg == "-" {
			options = append(options, option{value: arg})
			continue
		}
		name := strings.TrimPrefix(strings.TrimPrefix(arg, "-"), "-")
		if name == "" || strings.HasPrefix(name, "-") {
			return nil, fmt.Errorf("%s is no option of QEMU", arg)
		}
		last := i+1 == len(args)
		known := slices.Contains(valued, name)
		if slices.Contains(flags, name) || !known && (last || strings.HasPrefix(args[i+1], "-")) {
			options = append(options, option{name: name, bare: true})
			continue
		}
		if last {
			return nil, fmt.Errorf("QEMU's option %s lacks its value", arg)
		}
		i++
		options = append(options, option{name: name, value: args[i]})
	}
	return options, nil
}

// args is the inverse of parseOptions.
func (o option) args() []string {
	switch {
	case o.name == "":
		return []string{o.value}
	case o.bare:
		return []string{"-" + o.name}
	}
	return []string{"-" + o.name, o.value}
}

// A setting is one "key=value" of an option's value, or a word without '='.
type setting struct {
	key, value string
	word       bool // has no '=': "nowait", or the first word of "socket,id=..."
}

// parseSettings splits a value such as "socket,id=a,path=/x,,y" into settings. A doubled comma stands for one comma
// (opts_parse in util/qemu-option.c).
func parseSettings(value string) []setting {
	var settings []setting
	var part strings.Builder
	flush := func() {
		key, val, hasValue := strings.Cut(part.String(), "=")
		settings = append(settings, setting{key: key, value: val, word: !hasValue})
		part.Reset()
	}
	for i := 0; i < len(value); i++ {
		switch {
		case value[i] != ',':
			part.WriteByte(value[i])
		case i+1 < len(value) && value[i+1] == ',':
			part.WriteByte(',')
			i++
		default:
			flush()
		}
	}
	flush()
	return settings
}

// joinSettings is the inverse of parseSettings.
func joinSettings(settings []setting) string {
	parts := make([]string, 0, len(settings))
	for _, s := range settings {
		part := s.key
		if !s.word {
			part += "=" + s.value
		}
		parts = append(parts, strings.ReplaceAll(part, ",", ",,"))
	}
	return strings.Join(parts, ",")
}

// get returns the value of the last setting with the given key, as QEMU does, or "" if there is none.
func get(settings []setting, key string) string {
	for _, s := range slices.Backward(settings) {
		if s.key == key && !s.word {
			return s.value
		}
	}
	return ""
}

// implied returns the value of a key that the first setting may leave out.
func implied(settings []setting, key string) string {
	value := get(settings, key)
	if value == "" && len(settings) > 0 && settings[0].word {
		return settings[0].key
	}
	return value
}
