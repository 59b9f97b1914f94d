// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"fmt"
)

// addrD is the address of the third host that has VMs.
const addrD = "10.77.0.3"

// AddHost makes a third host for VMs, with its own cable to A. B cannot reach it. Like the others, it has its own
// memory and storage.
func (l *Lab) AddHost(ctx context.Context) (*Host, error) {
	d, err := l.newHost("d", addrD)
	if err != nil {
		return nil, err
	}
	l.onClose(d.endAll)
	if err := d.MakeVMDir(); err != nil {
		return nil, err
	}
	script := fmt.Sprintf("ip link add cable3 type veth peer name cable netns %d\n"+
		"ip addr add %s/32 dev cable3\nip link set cable3 up\n"+
		"ip route add %s/32 dev cable3 src %[2]s\n", d.PID(), addrA, addrD)
	if _, err := l.A.Run(ctx, "sh", "-ec", script); err != nil {
		return nil, fmt.Errorf("cable to the third host: %w", err)
	}
	_, err = d.Run(ctx, "sh", "-ec", fmt.Sprintf("ip addr add %s/24 dev cable\nip link set cable up", addrD))
	return d, err
}
