// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"fmt"
	"strings"

	"github.com/migrated-vm/migrated/internal/config"
	"github.com/migrated-vm/migrated/pkg/mtls"
)

// settings returns the current configuration: that of the last Reload, or cfg, with which the daemon was started.
func (d *Daemon) settings() config.Config {
	if reloaded := d.reloaded.Load(); reloaded != nil {
		return *reloaded
	}
	return d.cfg
}

// Reload takes over the keys of next that can change while the daemon runs: who may connect, and the bandwidth of
// migrations that begin from now on. Only one caller may use it at a time. After an error nothing has changed.
func (d *Daemon) Reload(next config.Config) error {
	next.FaultWorkers = workersOrDefault(next.FaultWorkers)
	changed, waiting, err := d.settings().Reload(next)
	if err != nil {
		return fmt.Errorf("the reloaded keys do not fit the running configuration (other keys need a restart): %w", err)
	}
	d.reloaded.Store(&changed)
	d.limitHost()
	if len(waiting) > 0 {
		d.log.Warn("parts of the configuration wait for a restart of the daemon", "keys", strings.Join(waiting, ", "))
	}
	d.log.Info("reloaded the configuration", "peers", len(changed.Peers), "operators", len(changed.Operators),
		"bandwidth", changed.Bandwidth)
	return nil
}

// allowPeer, allowOperator and allowMetrics decide by the current configuration, also for connections that were made
// before it was loaded.
func (d *Daemon) allowPeer(names []string) error { return d.settings().PeerList().Allow(names) }

func (d *Daemon) allowOperator(names []string) error {
	return mtls.AnyOf(d.settings().Operators)(names)
}

func (d *Daemon) allowMetrics(names []string) error {
	return mtls.AnyOf(d.settings().MetricsClients)(names)
}
