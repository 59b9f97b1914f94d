// SPDX-License-Identifier: Apache-2.0

package qmp

import (
	"strings"
	"testing"
)

// The kernel says "invalid argument" to a path that is too long.
func TestLongPath(t *testing.T) {
	_, err := Dial(t.Context(), "/run/"+strings.Repeat("x", maxSocketPath))
	if err == nil || !strings.Contains(err.Error(), "112 bytes, at most 107 are possible") {
		t.Error(err)
	}
}
