// SPDX-License-Identifier: Apache-2.0

package migration

import migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"

// Meaning returns a sentence that says what a migration's state means for its VM. Where the VM is comes from the
// migration's Location, which the daemon has found out.
func Meaning(m *migratedv1.Migration) string {
	switch m.GetState() {
	case migratedv1.MigrationState_MIGRATION_STATE_SETUP:
		switch {
		case m.GetWaiting() != "":
			return "it waits for its turn: " + m.GetWaiting()
		case m.GetPrepared():
			return "both sides are ready; " + LocationText(m)
		case m.GetLocation() == migratedv1.Location_LOCATION_UNKNOWN: // nobody has looked yet
			return "both sides get ready"
		}
		return "both sides get ready; " + LocationText(m)
	case migratedv1.MigrationState_MIGRATION_STATE_DEVICE:
		return "the state of the devices moves; " + LocationText(m)
	case migratedv1.MigrationState_MIGRATION_STATE_HANDOVER:
		return "the destination was told to run the VM, and has not answered; " + LocationText(m)
	case migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_ACTIVE:
		return LocationText(m) + " and its memory follows"
	case migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_PAUSED:
		return LocationText(m) + "; the connection to its memory is lost"
	case migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_RECOVER:
		return LocationText(m) + "; the connection to its memory is made again"
	case migratedv1.MigrationState_MIGRATION_STATE_ENDED:
		return "the VM ended by itself at the destination"
	case migratedv1.MigrationState_MIGRATION_STATE_COMPLETED:
		return "the VM and all its memory are at the destination"
	case migratedv1.MigrationState_MIGRATION_STATE_FAILED:
		return "it ended with an error"
	case migratedv1.MigrationState_MIGRATION_STATE_CANCELLED:
		return "the migration was cancelled; " + LocationText(m)
	case migratedv1.MigrationState_MIGRATION_STATE_REHEARSED:
		return "the rehearsal is over; " + LocationText(m)
	default:
		return "a state that this program does not know"
	}
}

// LocationText returns a clause that says where the VM is.
func LocationText(m *migratedv1.Migration) string {
	switch m.GetLocation() {
	case migratedv1.Location_LOCATION_SOURCE:
		return "the VM is at the source"
	case migratedv1.Location_LOCATION_DESTINATION:
		return "the VM is at the destination"
	case migratedv1.Location_LOCATION_NOWHERE:
		return "the VM runs nowhere"
	case migratedv1.Location_LOCATION_ENDED:
		return "the VM has ended"
	default:
		if m.GetRole() == migratedv1.MigrationRole_MIGRATION_ROLE_DESTINATION {
			return "it is not known here where the VM is, the source may know"
		}
		return "it is not known where the VM is"
	}
}
