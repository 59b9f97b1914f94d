// SPDX-License-Identifier: Apache-2.0

// Package testenv handles tests that cannot run on this machine.
package testenv

import (
	"os"
	"testing"
)

// CannotRun ends a test that cannot run here. It skips the test with the reason. In CI, where
// every test must run, it fails the test.
func CannotRun(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("cannot run: "+format, args...)
	}
	t.Skipf(format, args...)
}
