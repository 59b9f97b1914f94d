// SPDX-License-Identifier: Apache-2.0

package migration

import migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"

// A Leftover shows a migration that an earlier run of the daemon left and that this one cannot take up, so that its
// operator learns of it. The embedded Tracker never changes.
type Leftover struct {
	*Tracker
	done chan struct{}
}

// NewLeftover returns a Leftover for migration id. why says why it could not be taken up.
func NewLeftover(id string, role migratedv1.MigrationRole, why error) *Leftover {
	l := &Leftover{Tracker: newTracker(&migratedv1.Migration{Id: id, Role: role}), done: make(chan struct{})}
	close(l.done)
	if reasonOf(why) == migratedv1.Reason_REASON_UNSPECIFIED {
		why = withRemedy(withReason(why, migratedv1.Reason_REASON_STATE_UNREADABLE), Remedy(why))
	}
	l.fail(migratedv1.MigrationState_MIGRATION_STATE_FAILED, why,
		whereabouts{
			migratedv1.Location_LOCATION_UNKNOWN, "this daemon cannot read what is known of the VM, and has not touched it",
		})
	return l
}

// Done returns a closed channel: there is nothing to wait for.
func (l *Leftover) Done() <-chan struct{} { return l.done }
