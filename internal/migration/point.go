// SPDX-License-Identifier: Apache-2.0

//go:build !chaos

package migration

// testPoint marks an arrow of the drawing in doc.go, so that e2e/chaos can break a daemon at that point. It does
// nothing: only the daemon of that suite is built with point_chaos.go.
func testPoint(string) {}
