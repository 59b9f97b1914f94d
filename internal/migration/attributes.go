// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"github.com/migrated-vm/migrated/internal/qemu/process"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// attributesTo returns the process attributes that the destination's QEMU is to get.
func attributesTo(a process.Attributes) *migratedv1.ProcessAttributes {
	return &migratedv1.ProcessAttributes{OomScoreAdj: int32(a.OOMScoreAdj), Umask: a.Umask}
}

// attributesOf is the inverse of attributesTo. nil: the source did not say.
func attributesOf(a *migratedv1.ProcessAttributes) *process.Attributes {
	if a == nil {
		return nil
	}
	return &process.Attributes{OOMScoreAdj: int(a.GetOomScoreAdj()), Umask: a.GetUmask() & 0o777}
}
