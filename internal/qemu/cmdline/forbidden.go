// SPDX-License-Identifier: Apache-2.0

package cmdline

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
)

// A ForbiddenError means that a command line has an option that this host forbids. It does not show the option's value,
// which may be a secret.
type ForbiddenError struct {
	Entry string // the entry of the list of forbidden options
}

func (e *ForbiddenError) Error() string {
	name, key, hasKey := strings.Cut(e.Entry, " ")
	if hasKey {
		return fmt.Sprintf("the destination starts no QEMU with %s= in -%s or by -set", key, name)
	}
	return fmt.Sprintf("the destination starts no QEMU with -%s", name)
}

// ParseForbidden checks an entry of the list of forbidden options. "NAME" forbids QEMU's option -NAME. "NAME KEY"
// forbids the setting KEY of that option, except with the value "no". Both also forbid -set for that option.
func ParseForbidden(entry string) error {
	fields := strings.Fields(entry)
	if len(fields) < 1 || len(fields) > 2 || strings.Join(fields, " ") != entry || strings.HasPrefix(entry, "-") {
		return fmt.Errorf("%q is not the name of an option, or of an option and a setting", entry)
	}
	return nil
}

// checkForbidden returns a *ForbiddenError if an option is on the list.
func checkForbidden(options []option, forbidden []string) error {
	for _, entry := range forbidden {
		name, key, hasKey := strings.Cut(entry, " ")
		if slices.ContainsFunc(options, func(o option) bool {
			target, _ := o.setTarget()
			return o.name == name && (!hasKey || o.sets(key)) || target.name == name && (!hasKey || target.sets(key))
		}) {
			return &ForbiddenError{entry}
		}
	}
	return nil
}

// setTarget returns what "-set GROUP.ID.KEY=VALUE" sets: the option GROUP with KEY=VALUE, for the GROUP with that id
// (qemu_set_option in softmmu/vl.c). It returns no option for any other.
func (o option) setTarget() (target option, id string) {
	if o.name != "set" {
		return option{}, ""
	}
	group, rest, _ := strings.Cut(o.value, ".")
	id, rest, _ = strings.Cut(rest, ".")
	key, value, _ := strings.Cut(rest, "=")
	return option{name: group, value: joinSettings([]setting{{key: key, value: value}})}, id
}

// sets reports whether the option has the setting key with a value other than "no". QEMU takes a value that begins with
// "{" as JSON, and a word as "on", or as "off" after "no": it would run a program of that name.
func (o option) sets(key string) bool {
	if strings.HasPrefix(o.value, "{") {
		var settings map[string]any
		if json.Unmarshal([]byte(o.value), &settings) != nil {
			return true // it is unknown how QEMU would read this
		}
		value, found := settings[key]
		return found && value != "no"
	}
	return slices.ContainsFunc(parseSettings(o.value), func(s setting) bool {
		return s.key == key && s.value != "no" || s.word && s.key == "no"+key
	})
}
