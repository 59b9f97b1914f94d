// SPDX-License-Identifier: Apache-2.0

// Package metrics shows what a daemon has counted to Prometheus. It counts nothing itself: each scrape reads a State, and
// what answers page faults is neither locked nor told. docs/metrics.md is made of what stands in families.go.
package metrics

import (
	"slices"
	"time"

	"github.com/migrated-vm/migrated/internal/migration"
	"github.com/migrated-vm/migrated/pkg/postcopy"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// State is a daemon at one moment.
type State struct {
	Version      string
	Protocol     uint32
	Migrations   []Migration // those that the daemon knows
	Totals       Totals
	Refusals     map[string]uint64    // by kind
	Certificates map[string]time.Time // when what is in a file expires, by the setting that names it
}

// Migration is one as its daemon shows it.
type Migration struct {
	View  *migratedv1.Migration
	Times migration.Times
	// Left says that an earlier run of the daemon left it and that it could not be taken up.
	Left bool
}

// Totals is what was counted of all migrations since the daemon began, those that it has forgotten included. None of it
// falls.
type Totals struct {
	Incoming migration.Counts // of those to this host
	roles    map[migratedv1.MigrationRole]*roleTotals
}

// roleTotals are of the migrations of one role.
type roleTotals struct {
	Ended    map[migratedv1.MigrationState]uint64 // by the state that they ended in
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

// Add adds what a migration has to be counted for.
func (t *Totals) Add(view *migratedv1.Migration) {
	r := t.of(view.GetRole())
	if migration.Terminal(view.GetState()) {
		r.Ended[view.GetState()]++
	}
	if d := view.GetProgress().GetDowntime(); d != nil {
		r.Downtime.Record(d.AsDuration())
	}
}

// AddAll adds all of o.
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

// NewestFirst sorts migrations by their beginning.
func NewestFirst(migrations []Migration) {
	slices.SortFunc(migrations, func(a, b Migration) int {
		return b.View.GetCreateTime().AsTime().Compare(a.View.GetCreateTime().AsTime())
	})
}
