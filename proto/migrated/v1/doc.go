// SPDX-License-Identifier: Apache-2.0

// Package migratedv1 is the generated Go code of the migrated.v1 API: the
// control service that orchestrators drive, what two daemons say to each other,
// and the page data plane.
package migratedv1
