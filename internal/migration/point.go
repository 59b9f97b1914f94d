// SPDX-License-Identifier: Apache-2.0

//go:build !chaos

package migration

// reached marks an arrow of doc.go's picture, so that e2e/chaos can break a
// daemon right there. It does nothing: only that suite's daemon is built with
// point_chaos.go.
func reached(string) {}
