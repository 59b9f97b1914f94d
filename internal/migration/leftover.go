// SPDX-License-Identifier: Apache-2.0

package migration

import migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"

// A Leftover shows a migration that an earlier run of the daemon left, and that this one cannot take up. The embedded
// Tracker never changes: it is named so that its operator sees it.
type Leftover struct {
	*Tracker
	done chan struct{}
}

// NewLeftover makes one of what could not be taken up, and why.
func NewLeftover(id string, role migratedv1.MigrationRole, why error) *Leftover {
	l := &Leftover{Tracker: newTracker(&migratedv1.Migration{Id: id, Role: role}), done: make(chan struct{})}
	close(l.done)
	if reasonOf(why) == migratedv1.Reason_REASON_UNSPECIFIED {
		why = withRemedy(withReason(why, migratedv1.Reason_REASON_STATE_UNREADABLE), Remedy(why))
	}
	l.fail(migratedv1.MigrationState_MIGRATION_STATE_FAILED, why,
		whereabouts{migratedv1.Location_LOCATION_UNKNOWN, "this daemon cannot read what is known of the VM, and has not touched it"})
	return l
}

// Done is closed: there is nothing to be waited for.
func (l *Leftover) Done() <-chan struct{} { return l.done }
