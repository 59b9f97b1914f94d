// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
)

// A ForbiddenError says that a command line has what this host starts no QEMU with. It does not show the value, which may
// be a secret.
type ForbiddenError struct {
	Entry string // of the list of forbidden options
}

func (e *ForbiddenError) Error() string {
	name, key, hasKey := strings.Cut(e.Entry, " ")
	if hasKey {
		return fmt.Sprintf("the destination starts no QEMU with %s= in -%s", key, name)
	}
	return fmt.Sprintf("the destination starts no QEMU with -%s", name)
}

// ParseForbidden checks an entry of the list of forbidden options: "NAME" is QEMU's option -NAME, "NAME KEY" is the setting
// KEY of that option, unless it is "no".
func ParseForbidden(entry string) error {
	fields := strings.Fields(entry)
	if len(fields) < 1 || len(fields) > 2 || strings.Join(fields, " ") != entry || strings.HasPrefix(entry, "-") {
		return fmt.Errorf("%q is not the name of an option, or of an option and a setting", entry)
	}
	return nil
}

// checkForbidden refuses options that are on the list.
func checkForbidden(options []option, forbidden []string) error {
	for _, entry := range forbidden {
		name, key, hasKey := strings.Cut(entry, " ")
		if slices.ContainsFunc(options, func(o option) bool { return o.name == name && (!hasKey || o.sets(key)) }) {
			return &ForbiddenError{entry}
		}
	}
	return nil
}

// sets says whether the option has the setting key, and it is not "no". A value may be written as JSON, which QEMU tells
// by its first character.
func (o option) sets(key string) bool {
	if strings.HasPrefix(o.value, "{") {
		var settings map[string]any
		if json.Unmarshal([]byte(o.value), &settings) != nil {
			return true // what QEMU would read there is not known
		}
		value, found := settings[key]
		return found && value != "no"
	}
	return slices.ContainsFunc(parseSettings(o.value), func(s setting) bool {
		return s.key == key && s.value != "no" && !s.word
	})
}
