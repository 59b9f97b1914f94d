// SPDX-License-Identifier: Apache-2.0

package listing

import (
	"fmt"

	"github.com/migrated-vm/migrated/internal/migration"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// A Filter selects migrations. The zero value selects all.
type Filter struct {
	labels   map[string]string
	role     migratedv1.MigrationRole
	underWay bool
}

// NewFilter checks and converts a filter of the API.
func NewFilter(f *migratedv1.MigrationFilter) (Filter, error) {
	if err := migration.CheckLabels(f.GetLabels()); err != nil {
		return Filter{}, fmt.Errorf("filter: %w", err)
	}
	if _, known := migratedv1.MigrationRole_name[int32(f.GetRole())]; !known {
		return Filter{}, fmt.Errorf("filter: there is no role %d", f.GetRole())
	}
	return Filter{f.GetLabels(), f.GetRole(), f.GetUnderWay()}, nil
}

// Matches says whether the filter selects a migration in its current state.
func (f Filter) Matches(view *migratedv1.Migration) bool {
	return f.matchesConstants(view) && f.matchesOver(isOver(view))
}

// matchesOver says whether the filter selects migrations that are over, or those that are not.
func (f Filter) matchesOver(over bool) bool { return !f.underWay || !over }

// matchesConstants checks what never changes in a migration: its role and its labels.
func (f Filter) matchesConstants(view *migratedv1.Migration) bool {
	if f.role != migratedv1.MigrationRole_MIGRATION_ROLE_UNSPECIFIED && f.role != view.GetRole() {
		return false
	}
	labels := view.GetSpec().GetLabels()
	for key, value := range f.labels {
		if has, ok := labels[key]; !ok || has != value {
			return false
		}
	}
	return true
}

// Event returns what e means for a list of the selected migrations; LIST_EVENT_UNSPECIFIED: nothing. A change of state
// can add a migration to such a list, or remove it.
func (f Filter) Event(e *Event) migratedv1.ListEvent {
	const (
		nothing = migratedv1.ListEvent_LIST_EVENT_UNSPECIFIED
		added   = migratedv1.ListEvent_LIST_EVENT_ADDED
		changed = migratedv1.ListEvent_LIST_EVENT_CHANGED
		removed = migratedv1.ListEvent_LIST_EVENT_REMOVED
	)
	if !f.matchesConstants(e.View) {
		return nothing
	}
	was := e.What != added && f.matchesOver(e.wasOver)
	is := e.What != removed && f.matchesOver(isOver(e.View))
	switch {
	case was && is:
		return changed
	case is:
		return added
	case was:
		return removed
	}
	return nothing
}
