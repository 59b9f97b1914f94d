// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"fmt"
	"os/user"
	"strconv"
)

// LookupUser finds a user of this host, by name or number, with all of its groups.
func LookupUser(name string) (Credentials, error) {
	found, err := user.Lookup(name)
	if err != nil {
		if found, err = user.LookupId(name); err != nil {
			return Credentials{}, fmt.Errorf("this host has no user %q: %w", name, err)
		}
	}
	ids, err := found.GroupIds()
	if err != nil {
		return Credentials{}, fmt.Errorf("groups of user %q: %w", name, err)
	}
	var c Credentials
	for _, field := range []struct {
		text string
		to   *uint32
	}{{found.Uid, &c.UID}, {found.Gid, &c.GID}} {
		id, err := strconv.ParseUint(field.text, 10, 32)
		if err != nil {
			return Credentials{}, fmt.Errorf("user %q: %w", name, err)
		}
		*field.to = uint32(id)
	}
	for _, text := range ids {
		id, err := strconv.ParseUint(text, 10, 32)
		if err != nil {
			return Credentials{}, fmt.Errorf("groups of user %q: %w", name, err)
		}
		c.Groups = append(c.Groups, uint32(id))
	}
	return c, nil
}
