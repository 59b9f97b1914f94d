// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"github.com/migrated-vm/migrated/internal/qemu"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// attributesTo says to the destination what its QEMU process is to be given.
func attributesTo(a qemu.Attributes) *migratedv1.ProcessAttributes {
	return &migratedv1.ProcessAttributes{OomScoreAdj: int32(a.OOMScoreAdj), Umask: a.Umask}
}

// attributesOf is its inverse; nil where the source did not say.
func attributesOf(a *migratedv1.ProcessAttributes) *qemu.Attributes {
	if a == nil {
		return nil
	}
	return &qemu.Attributes{OOMScoreAdj: int(a.GetOomScoreAdj()), Umask: a.GetUmask() & 0o777}
}
