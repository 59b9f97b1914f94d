// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
)

// qemuConf is libvirt's configuration of the whole host's VMs (drvqemu.rst of libvirt).
const qemuConf = "/etc/libvirt/qemu.conf"

// lockManager matches the setting with which libvirt takes leases of images. Without it, and with "nop", it takes none.
var lockManager = regexp.MustCompile(`(?m)^[ \t]*lock_manager[ \t]*=[ \t]*["']+([^"'\n]+)["']`)

// WhyLeases returns an error if this host's libvirt may take leases of its domains' images (virtlockd, sanlock). It
// gives them back whenever QEMU stops a VM, and takes them again only where it continues the VM itself. A QEMU that
// stops and continues a VM by itself leaves it without.
func WhyLeases() error { return whyLeases(qemuConf) }

func whyLeases(path string) error {
	text, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist): // libvirt goes without it, too
		return nil
	case err != nil:
		return fmt.Errorf("whether libvirt takes leases of the VM's images is not known: %w", err)
	}
	for _, set := range lockManager.FindAllSubmatch(text, -1) {
		if name := string(set[1]); name != "nop" {
			return fmt.Errorf("libvirt takes leases of the VM's images (lock_manager = %q in %s), "+
				"and would not take them again after the pause", name, path)
		}
	}
	return nil
}
