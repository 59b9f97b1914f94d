// SPDX-License-Identifier: Apache-2.0

package check

import (
	"context"
	"fmt"

	"github.com/migrated-vm/migrated/internal/qemu"
)

// checkDomain says what libvirt keeps of a domain on this host that does not move with it.
func checkDomain(ctx context.Context, vm *qemu.VM) (results []Result, err error) {
	keeps, err := vm.DomainKeeps(ctx)
	if err != nil {
		return nil, err
	}
	if keeps.Snapshots+keeps.Checkpoints > 0 {
		results = append(results, Result{
			Subject: "snapshots", Status: Warning,
			Detail: fmt.Sprintf("libvirt here has %d snapshots and %d checkpoints of the domain, which do not move with it",
				keeps.Snapshots, keeps.Checkpoints),
			Remedy: "nothing, if the domain stays defined here: libvirt keeps them; --undefine-source is refused",
		})
	}
	if keeps.Autostart {
		results = append(results, Result{
			Subject: "autostart", Status: Warning,
			Detail: "libvirt starts the domain when this host starts, which does not change when it moves: " +
				"it could run twice; libvirt at the destination does not start it",
			Remedy: "when it has moved: virsh autostart --disable on this host unless its definition was removed, " +
				"and virsh autostart on the destination if it is defined there",
		})
	}
	return results, nil
}
