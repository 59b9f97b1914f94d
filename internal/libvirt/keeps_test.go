// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"testing"

	"github.com/migrated-vm/migrated/internal/libvirt/libvirttest"
)

// TestKeeps: what libvirt keeps with a definition is counted, and what cannot be asked for is no nothing.
func TestKeeps(t *testing.T) {
	daemon, d := aRun(t)
	if got, err := d.Keeps(t.Context()); err != nil || got != (Keeps{}) {
		t.Errorf("%+v, %v", got, err)
	}
	daemon.Change(func(d *libvirttest.Domain) { d.Snapshots, d.Checkpoints, d.Autostart = 2, 1, true })
	if got, err := d.Keeps(t.Context()); err != nil || got != (Keeps{2, 1, true}) {
		t.Errorf("%+v, %v", got, err)
	}
	for _, call := range []string{"autostart", "checkpoints", "snapshots"} {
		daemon.Refuse(call, "not now")
		if got, err := d.Keeps(t.Context()); err == nil {
			t.Errorf("without %s: %+v", call, got)
		}
	}
}
