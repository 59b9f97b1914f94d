// SPDX-License-Identifier: Apache-2.0

package launch

import (
	"os"

	"github.com/migrated-vm/migrated/internal/qemu/cmdline"
	"github.com/migrated-vm/migrated/internal/qemu/process"
)

// StartsAs returns the credentials with which to start a QEMU that will run as runs, which is the user that /proc shows
// for the source's QEMU. They differ if QEMU gives up root itself at the end of its start (-runas, -run-with user=):
// before that, it opens disks, network cards and sockets as root, and the other user may not have the right to.
//
// A daemon that is not root always starts QEMU as runs.
func StartsAs(argv []string, runs process.Credentials) (process.Credentials, error) {
	switches, err := cmdline.SwitchesUser(argv)
	if err != nil || !switches || os.Geteuid() != 0 {
		return runs, err
	}
	return process.Credentials{}, nil
}
