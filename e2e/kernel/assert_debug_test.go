// SPDX-License-Identifier: Apache-2.0

package kernel

import "testing"

// The debug kernel does what the patched one does, and survives what is too
// rough for a kernel that does not watch itself. Boot fails where it complains.
func TestAssertionsDebug(t *testing.T) {
	assert(t, Debug, allPoints()...)
}
