// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"fmt"
	"strings"

	"github.com/migrated-vm/migrated/internal/config"
	"github.com/migrated-vm/migrated/internal/mtls"
)

// settings is the configuration as it was loaded last. Where it differs from cfg, cfg is what this daemon was started with.
func (d *Daemon) settings() config.Config {
	if reloaded := d.reloaded.Load(); reloaded != nil {
		return *reloaded
	}
	return d.cfg
}

// Reload takes from a configuration what can change while the daemon runs: who may connect, and the limit of migrations
// that begin from now on. It is for one caller at a time. After an error all stays as it was.
func (d *Daemon) Reload(next config.Config) error {
	next.FaultWorkers = orChosen(next.FaultWorkers)
	changed, waiting, err := d.settings().Reload(next)
	if err != nil {
		return fmt.Errorf("beside what cannot change without a restart: %w", err)
	}
	d.reloaded.Store(&changed)
	if len(waiting) > 0 {
		d.log.Warn("parts of the configuration wait for a restart of the daemon", "keys", strings.Join(waiting, ", "))
	}
	d.log.Info("reloaded the configuration", "peers", len(changed.Peers), "operators", len(changed.Operators), "bandwidth", changed.Bandwidth)
	return nil
}

// allowPeer, allowOperator and allowMetrics decide by the configuration of the moment, also on connections that are older.
func (d *Daemon) allowPeer(names []string) error { return d.settings().PeerList().Allow(names) }

func (d *Daemon) allowOperator(names []string) error {
	return mtls.AnyOf(d.settings().Operators)(names)
}

func (d *Daemon) allowMetrics(names []string) error {
	return mtls.AnyOf(d.settings().MetricsClients)(names)
}
