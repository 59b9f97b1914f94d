// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// foreign returns an error if a daemon shows pages that were there before they came. If no process but QEMU maps the
// VM's memory, the engine has lost count of what it did. If another process does, the pages must have been written
// again.
func (j *journey) foreign(shown ...*migratedv1.Migration) error {
	for _, m := range shown {
		if p := m.GetProgress(); p.GetPagesTouched() != 0 && !j.mapped || p.GetPagesUnexplained() != 0 {
			return fmt.Errorf("migration %s: %d pages were there before they came, and %d more could not be written again",
				m.GetId(), p.GetPagesTouched(), p.GetPagesUnexplained())
		}
	}
	return nil
}
