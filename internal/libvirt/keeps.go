// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"fmt"

	golibvirt "github.com/digitalocean/go-libvirt"
)

// Keeps is what libvirt keeps with a domain's definition on this host, and what does not move with the domain.
type Keeps struct {
	Snapshots, Checkpoints int
	Autostart              bool // libvirt starts the domain when this host starts
}

// Keeps returns what libvirt keeps with the domain's definition.
func (d *Domain) Keeps(ctx context.Context) (k Keeps, err error) {
	defer d.closeAfter(ctx)()
	_, snapshots, err := d.DomainListAllSnapshots(d.id, 0, 0)
	if err != nil {
		return k, fmt.Errorf("snapshots of libvirt's domain %s: %w", d.Name(), err)
	}
	_, checkpoints, err := d.DomainListAllCheckpoints(d.id, 0, 0)
	if isError(err, golibvirt.ErrNoSupport) { // libvirt before 5.6 has none
		err = nil
	}
	if err != nil {
		return k, fmt.Errorf("checkpoints of libvirt's domain %s: %w", d.Name(), err)
	}
	autostart, err := d.DomainGetAutostart(d.id)
	if err != nil {
		return k, fmt.Errorf("autostart of libvirt's domain %s: %w", d.Name(), err)
	}
	return Keeps{int(snapshots), int(checkpoints), autostart != 0}, nil
}
