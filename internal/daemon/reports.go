// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/migrated-vm/migrated/internal/migration"
	"github.com/migrated-vm/migrated/internal/report"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// reportsDir is the directory of reports.
func (d *Daemon) reportsDir() string { return filepath.Join(d.cfg.StateDir, "reports") }

// reportOf makes the report of a migration as it is now.
func reportOf(t tracked) *migratedv1.Report {
	r := t.Report()
	r.Findings = report.Findings(r)
	return r
}

// keepReport writes the report of a migration that is over. If an earlier run of this daemon saw its end and wrote a
// report, that one has more, and stays.
func (d *Daemon) keepReport(t tracked) {
	d.deleting.Lock()
	defer d.deleting.Unlock()
	if t.Deleted() {
		return
	}
	r := reportOf(t)
	m := r.GetMigration()
	if !migration.Terminal(m.GetState()) || t.WasOver() && d.reports.Has(m.GetId(), m.GetRole()) {
		return
	}
	if err := d.reports.Keep(r); err != nil {
		d.log.Warn("a report will be lost with this daemon", "error", err)
	}
}

// follow traces a migration; life has its span, from traces.Begin. When the migration is over, follow lets waiting ones
// begin, and keeps its report.
func (d *Daemon) follow(life context.Context, t tracked) {
	d.traces.Follow(life, t)
	d.keeping.Go(func() {
		<-t.Done()
		d.migrations.outgoing.Advance()
		d.migrations.incoming.Advance()
		d.keepReport(t)
	})
}

// Report returns the report of a migration in memory, unless an earlier run of this daemon has seen its end and written
// a report.
func (c *controlService) Report(
	_ context.Context, request *migratedv1.ReportRequest,
) (*migratedv1.ReportResponse, error) {
	id, role := request.GetId(), request.GetRole()
	t := c.daemon.migrations.findAs(id, role)
	if t != nil && !t.WasOver() {
		return &migratedv1.ReportResponse{Report: reportOf(t)}, nil
	}
	for _, side := range []migratedv1.MigrationRole{
		migratedv1.MigrationRole_MIGRATION_ROLE_SOURCE, migratedv1.MigrationRole_MIGRATION_ROLE_DESTINATION,
	} {
		if role != side && role != migratedv1.MigrationRole_MIGRATION_ROLE_UNSPECIFIED || !validID.MatchString(id) {
			continue
		}
		if r := c.daemon.reports.Load(id, side); r != nil {
			return &migratedv1.ReportResponse{Report: r}, nil
		}
	}
	if t != nil {
		return &migratedv1.ReportResponse{Report: reportOf(t)}, nil
	}
	return nil, c.daemon.noReport(id)
}

// noReport returns an error that lists the reports that there are.
func (d *Daemon) noReport(id string) error {
	const most = 10
	kept := d.reports.IDs()
	if len(kept) == 0 {
		return status.Errorf(codes.NotFound,
			"this daemon has no report of migration %q, and no other reports", id)
	}
	shown := strings.Join(kept[:min(most, len(kept))], ", ")
	if len(kept) > most {
		shown += ", …"
	}
	return status.Errorf(codes.NotFound,
		"this daemon has no report of migration %q; it has these, newest first: %s", id, shown)
}

// mostChecked is how many checks are remembered.
const mostChecked = 64

// checked remembers the results of checks, for the reports of migrations.
type checked struct {
	mu  sync.Mutex
	all []checkedVM // the oldest first; one for each VM and destination
}

type checkedVM struct {
	vm, destination string
	found           *migratedv1.EarlierCheck
}

// add remembers the results of checking a VM, with a destination or without one.
func (c *checked) add(vm, destination string, results []*migratedv1.CheckResult) {
	found := &migratedv1.EarlierCheck{Time: timestamppb.Now()}
	for _, r := range results {
		if r.GetStatus() != migratedv1.CheckStatus_CHECK_STATUS_OK {
			found.Results = append(found.Results, proto.CloneOf(r))
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.all = slices.DeleteFunc(c.all, func(old checkedVM) bool { return old.vm == vm && old.destination == destination })
	c.all = append(c.all, checkedVM{vm, destination, found})
	if len(c.all) > mostChecked {
		c.all = slices.Delete(c.all, 0, 1)
	}
}

// of returns the last check of a VM with that destination or without any; nil: there was none.
func (c *checked) of(vm, destination string) *migratedv1.EarlierCheck {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, one := range slices.Backward(c.all) {
		if one.vm == vm && (one.destination == destination || one.destination == "") {
			return one.found
		}
	}
	return nil
}
