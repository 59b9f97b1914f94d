// SPDX-License-Identifier: Apache-2.0

// Package metrics exports the counts of a daemon to Prometheus. It counts nothing itself: each scrape reads a State,
// which takes no lock that the fault workers need. The table in docs/metrics.md is generated from families.go.
package metrics

import (
	"slices"
	"time"

	"github.com/migrated-vm/migrated/internal/migration"
	"github.com/migrated-vm/migrated/pkg/postcopy"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// State is the state of a daemon at one moment.
type State struct {
	Version      string
	Protocol     uint32
	Migrations   []Migration // sorted by NewestFirst
	Totals       Totals
	Refusals     map[string]uint64    // by kind
	Certificates map[string]time.Time // when a certificate expires, by the setting that names its file
}

// Migration is the state of one migration.
type Migration struct {
	View  *migratedv1.Migration
	Times migration.Times
	// Left says that an earlier run of the daemon left the migration, and that it could not be taken up.
	Left bool
}

// Totals has the counts of all migrations since the daemon started, also of those that it has forgotten. Counts never
// decrease.
type Totals struct {
	Incoming migration.Counts // of migrations to this host
	roles    map[migratedv1.MigrationRole]*roleTotals
}

// roleTotals has the counts of the migrations of one role.
type roleTotals struct {
	Ended    map[migratedv1.MigrationState]uint64 // how many ended, by their last state
	Downtime postcopy.Durations
}

func (t *Totals) of(role migratedv1.MigrationRole) *roleTotals {
	if t.roles == nil {
		t.roles = make(map[migratedv1.MigrationRole]*roleTotals)
	}
	if t.roles[role] == nil {
		t.roles[role] = &roleTotals{Ended: make(map[migratedv1.MigrationState]uint64)}
	}
	return t.roles[role]
}

// Add adds the counts of one migration.
func (t *Totals) Add(view *migratedv1.Migration) {
	r := t.of(view.GetRole())
	if migration.Terminal(view.GetState()) {
		r.Ended[view.GetState()]++
	}
	if d := view.GetProgress().GetDowntime(); d != nil {
		r.Downtime.Record(d.AsDuration())
	}
}

// AddAll adds the counts in o.
func (t *Totals) AddAll(o *Totals) {
	t.Incoming.Add(&o.Incoming)
	for role, theirs := range o.roles {
		r := t.of(role)
		for state, n := range theirs.Ended {
			r.Ended[state] += n
		}
		r.Downtime.Add(&theirs.Downtime)
	}
}

// NewestFirst sorts migrations by the time of their creation, the newest first.
func NewestFirst(migrations []Migration) {
	slices.SortFunc(migrations, func(a, b Migration) int {
		return b.View.GetCreateTime().AsTime().Compare(a.View.GetCreateTime().AsTime())
	})
}
