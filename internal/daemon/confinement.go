// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"github.com/migrated-vm/migrated/internal/confine"
	"github.com/migrated-vm/migrated/internal/qemu/check"
)

// confineSelf drops the privileges that serving does not need. If that fails, the daemon serves nevertheless, because
// VMs that arrived before may wait for it.
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

// checkConfinement returns a result about how far this daemon is confined.
func checkConfinement() check.Result {
	r := check.Result{Subject: "confinement of the daemon"}
	state, err := confine.Current()
	switch {
	case err != nil:
		r.Status, r.Detail, r.Remedy = check.Warning, err.Error(), "mount /proc"
	case !state.Complete():
		r.Status, r.Detail = check.Warning, state.String()
		r.Remedy = "look for \"keeps more of its privileges\" in the daemon's log, which says what stands in the way"
	default:
		r.Detail = state.String()
	}
	return r
}
