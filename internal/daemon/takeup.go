// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"sync"

	"github.com/migrated-vm/migrated/internal/migration"
	"github.com/migrated-vm/migrated/internal/qemu/launch"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// incomingDir is the directory that has one for each migration to this host.
func (d *Daemon) incomingDir() string {
	_, incoming := migration.StateDirs(d.cfg.StateDir)
	return incoming
}

// pipeDir is the directory of the pipes that the QEMUs started by this daemon, or by earlier runs of it, write to. They
// are named by the migrations' ids.
func (d *Daemon) pipeDir() string { return filepath.Join(d.cfg.StateDir, "output") }

// maxLogs is how many logs of QEMUs are kept. They need a limit, because a peer can begin any number of migrations.
const maxLogs = 256

// limitLogs removes logs of QEMUs that ended long ago.
func (d *Daemon) limitLogs() {
	if err := launch.LimitLogs(d.pipeDir(), d.cfg.LogDir, maxLogs); err != nil {
		d.log.Warn("cannot remove old QEMU logs", "error", err)
	}
}

func (d *Daemon) sourceConfig() migration.SourceConfig {
	addresses := d.cfg.Advertise
	if len(addresses) == 0 {
		addresses = []string{net.JoinHostPort("", d.pagePort)}
	}
	return migration.SourceConfig{
		Pages: d.pages, Records: d.records, PageAddresses: addresses, Bandwidth: d.settings().BandwidthLimit(), Dial: d.dial,
		Versions: d.versions, Report: func(s *migration.Source) { d.keepReport(s) }, Log: d.log,
	}
}

func (d *Daemon) destinationConfig(dir string) migration.DestinationConfig {
	return migration.DestinationConfig{
		Dir: dir, PipeDir: d.pipeDir(), LogDir: d.cfg.LogDir, Cgroup: d.cfg.QEMUCgroup,
		Binaries: d.cfg.QEMUBinaries, TemplateDir: d.cfg.TemplateDir,
		ForbiddenOptions: d.cfg.ForbiddenOptions, MinUID: d.cfg.MinUID, RunAs: d.runAs, Starter: d.starter,
		LibvirtSocket: d.cfg.LibvirtSocket, FaultWorkers: d.cfg.FaultWorkers, RequireSecure: d.cfg.RequireSecure,
		Bandwidth: d.settings().BandwidthLimit(), Dial: d.dialLane, Versions: d.versions, Log: d.log,
	}
}

// takeUp continues the migrations of an earlier run of this daemon, however it ended.
// A record of a newer version is an error, and the daemon does not serve: only the
// daemon that wrote it can continue that migration. A damaged record is logged and
// listed, and does not hold up others. Its VM waits if it came to this host. If it
// stands still on this host, it is not moved, because it may have been handed over.
func (d *Daemon) takeUp() error {
	if err := d.records.Sweep(); err != nil {
		d.log.Warn("cannot remove unfinished files of an earlier run", "error", err)
	}
	records, err := d.records.All()
	if err != nil {
		return err
	}
	unread, err := d.records.Damaged()
	if err != nil {
		return err
	}
	if err := migration.RemoveEnded(d.incomingDir()); err != nil {
		d.log.Warn("cannot remove directories of ended migrations", "error", err)
	}
	if err := launch.FollowOutputs(d.pipeDir(), d.cfg.LogDir); err != nil {
		d.log.Warn("cannot log the output of QEMUs that an earlier run started", "error", err)
	}
	d.limitLogs()
	dirs, err := migration.KeptDirs(d.incomingDir())
	if err != nil {
		return fmt.Errorf("migrations to this host: %w", err)
	}
	var destinations []*migration.Destination
	left := map[string]error{}
	for _, dir := range dirs {
		life := d.traces.Begin(d.ctx, d.ctx, filepath.Base(dir), migratedv1.MigrationRole_MIGRATION_ROLE_DESTINATION)
		destination, err := migration.TakeUpDestination(life, d.destinationConfig(dir))
		if err != nil {
			d.log.Error("a migration to this host that an earlier run of this daemon left cannot be taken up",
				"error", err, "remedy", migration.Remedy(err))
			left[filepath.Base(dir)] = err
			continue
		}
		d.follow(life, destination)
		destinations = append(destinations, destination)
	}
	// Destinations are taken up first, because their VMs wait for it. Taking up a source waits for its QEMU, which may
	// hang, so all sources are taken up at once.
	sources, failures := make([]*migration.Source, len(records)), make([]error, len(records))
	var all sync.WaitGroup
	for i, rec := range records {
		all.Go(func() {
			life := d.traces.Begin(d.ctx, d.ctx, rec.ID, migratedv1.MigrationRole_MIGRATION_ROLE_SOURCE)
			if sources[i], failures[i] = migration.TakeUpSource(life, d.sourceConfig(), rec); failures[i] == nil {
				d.follow(life, sources[i])
			}
		})
	}
	all.Wait()
	for i, rec := range records {
		if failures[i] != nil {
			unread[rec.ID] = failures[i]
		}
	}
	for id, err := range unread {
		d.log.Error("a migration away from this host that an earlier run of this daemon left cannot be taken up",
			"migration", id, "error", err, "remedy", migration.Remedy(err))
	}
	sources = slices.DeleteFunc(sources, func(s *migration.Source) bool { return s == nil })
	d.migrations.takeUp(sources, destinations, left, unread)
	return nil
}
