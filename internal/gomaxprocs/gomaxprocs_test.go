// SPDX-License-Identifier: Apache-2.0

package gomaxprocs

import (
	"runtime"
	"testing"
)

// TestAdd: GOMAXPROCS is raised for each sleeper, in steps and up to a limit, and never lowered.
func TestAdd(t *testing.T) {
	before := runtime.GOMAXPROCS(0)
	defer func() { runtime.GOMAXPROCS(before); own, granted = 0, 0 }()
	for _, c := range []struct{ more, want int }{
		{1, step}, {step - 1, step}, {1, 2 * step}, {-step, 2 * step}, {step, 2 * step},
		{10 * most, most}, {-10*most - step - 1, most},
	} {
		Add(c.more)
		if got := runtime.GOMAXPROCS(0) - before; got != c.want {
			t.Errorf("%+d sleepers, now %d: %d processors more, want %d", c.more, sleepers, got, c.want)
		}
	}
}
