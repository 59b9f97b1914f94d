// SPDX-License-Identifier: Apache-2.0

package process

import (
	"fmt"
	"os/user"
	"strconv"
)

// Credentials are the user and groups that a process runs as.
type Credentials struct {
	UID, GID uint32
	Groups   []uint32
}

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

// A UserError means that the destination's QEMU runs as another user than the source's.
type UserError struct {
	Source, Here Credentials
}

func (e *UserError) Error() string {
	return fmt.Sprintf("QEMU runs as user %d, group %d at the destination, and as user %d, group %d at the source",
		e.Here.UID, e.Here.GID, e.Source.UID, e.Source.GID)
}

// CheckUser compares the user and group of a destination's QEMU with the source's. They can differ because a name
// (-runas NAME) may belong to another user on this host. It does not compare supplementary groups: where QEMU runs as a
// named user, this host decides about them.
func (c Credentials) CheckUser(source Credentials) error {
	if c.UID == source.UID && c.GID == source.GID {
		return nil
	}
	return &UserError{Source: source, Here: c}
}
