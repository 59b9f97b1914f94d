// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"github.com/migrated-vm/migrated/internal/confine"
	"github.com/migrated-vm/migrated/internal/qemu"
)

// confineSelf gives up what serving does not need. A daemon that cannot serves all the same: VMs that arrived
// before may wait for it.
func (d *Daemon) confineSelf() {
	if err := d.confine(); err != nil {
		d.log.Warn("this daemon keeps more of its privileges than it needs", "error", err)
	}
	state, err := confine.Current()
	if err != nil {
		d.log.Warn("cannot tell what confines this daemon", "error", err)
		return
	}
	d.log.Info("confined", "by", state.String())
}

// checkConfinement says what confines this daemon.
func checkConfinement() qemu.Result {
	r := qemu.Result{Subject: "confinement of the daemon"}
	state, err := confine.Current()
	switch {
	case err != nil:
		r.Status, r.Detail, r.Remedy = qemu.Warning, err.Error(), "mount /proc"
	case !state.Complete():
		r.Status, r.Detail = qemu.Warning, state.String()
		r.Remedy = "look for \"keeps more of its privileges\" in the daemon's log, which says what stands in the way"
	default:
		r.Detail = state.String()
	}
	return r
}
