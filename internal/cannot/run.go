// SPDX-License-Identifier: Apache-2.0

// Package cannot ends tests that cannot run where they are.
package cannot

import (
	"os"
	"testing"
)

// Run ends a test that cannot run here: it is skipped with the reason, but fails
// in CI, where everything must run.
func Run(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("cannot run: "+format, args...)
	}
	t.Skipf(format, args...)
}
