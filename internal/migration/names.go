// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"fmt"
	"strings"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// StateName returns the name of a state as QEMU spells its own states, for example "postcopy-active". The command line
// and the metrics use it.
func StateName(s migratedv1.MigrationState) string { return Name(s, "MIGRATION_STATE_") }

// RoleName returns "source" or "destination".
func RoleName(r migratedv1.MigrationRole) string { return Name(r, "MIGRATION_ROLE_") }

// Name returns the name of an enumeration's value in lower case, with dashes, and without prefix, which all values of
// that enumeration share.
func Name(value fmt.Stringer, prefix string) string {
	return strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(value.String(), prefix), "_", "-"))
}
