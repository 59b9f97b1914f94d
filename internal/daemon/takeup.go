// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"fmt"
	"net"
	"path/filepath"

	"golang.org/x/sync/errgroup"

	"github.com/migrated-vm/migrated/internal/migration"
)

// incomingDir has a directory for each migration to this host.
func (d *Daemon) incomingDir() string { return filepath.Join(d.cfg.StateDir, "incoming") }

func (d *Daemon) sourceConfig() migration.SourceConfig {
	addresses := d.cfg.Advertise
	if len(addresses) == 0 {
		addresses = []string{net.JoinHostPort("", d.pagePort)}
	}
	return migration.SourceConfig{
		Pages: d.pages, Records: d.records, PageAddresses: addresses, Bandwidth: d.cfg.BandwidthLimit(), Dial: d.dial, Log: d.log,
	}
}

func (d *Daemon) destinationConfig(dir string) migration.DestinationConfig {
	return migration.DestinationConfig{
		Dir: dir, Binaries: d.cfg.QEMUBinaries, Starter: d.starter, FaultWorkers: d.cfg.FaultWorkers, RequireSecure: d.cfg.RequireSecure,
		Bandwidth: d.cfg.BandwidthLimit(), Dial: d.dialLane, Log: d.log,
	}
}

// takeUp goes on with what an earlier run of this daemon left when it ended, in
// whatever way. A record that cannot be read keeps the daemon from serving: it
// may be about a VM that runs elsewhere. A migration to this host that cannot
// be taken up is one that waits, and no reason to keep others waiting.
func (d *Daemon) takeUp() error {
	records, err := d.records.All()
	if err != nil {
		return err
	}
	if err := migration.RemoveEnded(d.incomingDir()); err != nil {
		d.log.Warn("directories of migrations that are over stay", "error", err)
	}
	dirs, err := migration.KeptDirs(d.incomingDir())
	if err != nil {
		return fmt.Errorf("migrations to this host: %w", err)
	}
	var destinations []*migration.Destination
	left := map[string]error{}
	for _, dir := range dirs {
		destination, err := migration.TakeUpDestination(d.ctx, d.destinationConfig(dir))
		if err != nil {
			d.log.Error("a migration to this host that an earlier run of this daemon left cannot be taken up",
				"error", err, "remedy", migration.Remedy(err))
			left[filepath.Base(dir)] = err
			continue
		}
		destinations = append(destinations, destination)
	}
	// A source asks its QEMU, which takes its time where it hangs. VMs that came here wait meanwhile no longer.
	sources := make([]*migration.Source, len(records))
	var all errgroup.Group
	for i, rec := range records {
		all.Go(func() (err error) {
			sources[i], err = migration.TakeUpSource(d.ctx, d.sourceConfig(), rec)
			return err
		})
	}
	if err := all.Wait(); err != nil {
		return err
	}
	d.migrations.takeUp(sources, destinations, left)
	return nil
}
