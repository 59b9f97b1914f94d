// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"fmt"
	"os"
	"slices"
	"strings"
)

// StartsAs says as whom a QEMU with that command line has to be started so that it ends up as the user that runs, which
// is what /proc shows of the source's. They differ where QEMU gives up root by itself, at the end of its start (-runas,
// -run-with user=): before that it opens disks, network cards and sockets as root, which the other user may not.
//
// A daemon that is not root itself starts QEMU as what it is.
func StartsAs(argv []string, runs Credentials) (Credentials, error) {
	switches, err := SwitchesUser(argv)
	if err != nil || !switches || os.Geteuid() != 0 {
		return runs, err
	}
	return Credentials{}, nil
}

// SwitchesUser says whether a QEMU with that command line, argv[0] first, changes its user at the end of its start.
func SwitchesUser(argv []string) (bool, error) {
	if len(argv) == 0 {
		return false, nil
	}
	options, err := parseOptions(argv[1:])
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(options, func(o option) bool {
		// Settings of -run-with may be written as JSON, as those of few other options.
		return o.name == "runas" || o.name == "run-with" && (get(parseSettings(o.value), "user") != "" || strings.HasPrefix(o.value, "{"))
	}), nil
}

// A UserError says that QEMU runs as another user than at the source.
type UserError struct {
	Source, Here Credentials
}

func (e *UserError) Error() string {
	return fmt.Sprintf("QEMU runs as user %d, group %d at the destination, and as user %d, group %d at the source",
		e.Here.UID, e.Here.GID, e.Source.UID, e.Source.GID)
}

// CheckUser compares the user that QEMU runs as with the source's: a name that it was given (-runas NAME) may be another
// user's on this host. Supplementary groups are this host's own matter where a name says which they are.
func (f *Facts) CheckUser(source Credentials) error {
	if f.UID == source.UID && f.GID == source.GID {
		return nil
	}
	return &UserError{Source: source, Here: Credentials{UID: f.UID, GID: f.GID, Groups: f.Groups}}
}
