// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"fmt"
	"strings"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// StateName returns a state as QEMU spells its own: "postcopy-active". The command line and metrics have it so.
func StateName(s migratedv1.MigrationState) string { return Name(s, "MIGRATION_STATE_") }

// RoleName returns "source" or "destination".
func RoleName(r migratedv1.MigrationRole) string { return Name(r, "MIGRATION_ROLE_") }

// Name returns the value of an enumeration without the prefix that all of its values have, in lower case.
func Name(value fmt.Stringer, prefix string) string {
	return strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(value.String(), prefix), "_", "-"))
}
