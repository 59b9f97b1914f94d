// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"errors"
	"fmt"
	"slices"

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/cmdline"
	"github.com/migrated-vm/migrated/internal/qemu/process"
)

// user returns the credentials that the destination's QEMU is to run with.
func (d *Destination) user() process.Credentials {
	if d.cfg.RunAs != nil {
		return *d.cfg.RunAs
	}
	machine := d.cfg.Request.GetMachine()
	return process.Credentials{UID: machine.GetUid(), GID: machine.GetGid(), Groups: machine.GetGroups()}
}

// mayStartAs refuses to start QEMU as a user that this host does not allow. The source names the user.
func (d *Destination) mayStartAs(argv []string, user process.Credentials) error {
	if d.cfg.RunAs != nil {
		switches, err := cmdline.SwitchesUser(argv)
		if err != nil {
			return err
		}
		if switches {
			return withRemedy(errors.New("the VM's command line names a user (-runas, -run-with user=), "+
				"but the destination starts every QEMU as its own user (run_as)"),
				"take that option out with --template, or empty run_as in the destination's configuration")
		}
	}
	least := d.cfg.MinUID
	rootGroup := least > 0 && (user.GID == 0 || slices.Contains(user.Groups, 0))
	if int64(user.UID) >= int64(least) && !rootGroup {
		return nil
	}
	err := fmt.Errorf("the destination starts no QEMU as user %d, group %d, groups %d: its min_uid is %d",
		user.UID, user.GID, user.Groups, least)
	if least > 0 && user.UID == 0 || rootGroup {
		err = fmt.Errorf("the destination starts no QEMU as root, or in root's group: "+
			"it would be started as user %d, group %d, groups %d", user.UID, user.GID, user.Groups)
	}
	return withRemedy(err, "run QEMU as another user, or name one in the destination's configuration (run_as), "+
		"or, where every peer is trusted with the whole host, set min_uid: 0 there")
}

// checkName refuses a QEMU whose own name differs from the name that the source gave. The name decides which VMs a
// peer may send, so it must be the VM's real name.
func (d *Destination) checkName(facts *qemu.Facts) error {
	claimed := d.cfg.Request.GetMachine().GetName()
	attached := d.cfg.Request.GetDestinationQmp() != ""
	if facts.Name == claimed || attached && facts.Name == "" {
		return nil
	}
	return withRemedy(fmt.Errorf("the source sends the VM %q, and the destination's QEMU is %q", claimed, facts.Name),
		"give both QEMUs the same -name")
}
