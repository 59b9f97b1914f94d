// SPDX-License-Identifier: Apache-2.0

package schedule

import (
	"runtime"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// A Sleeper goes to the scheduler once in a turn, where others may run, and otherwise just goes on.
func TestSleeper(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	synctest.Test(t, func(t *testing.T) {
		var s Sleeper
		var ran atomic.Bool
		go func() { ran.Store(true) }()
		for range 2 { // once in 61 times the scheduler lets who comes go on
			s = Sleeper{}
			s.Woke()
		}
		if !ran.Load() {
			t.Error("it did not go to the scheduler")
		}
		first := s.last
		time.Sleep(turn - 1)
		if s.Woke(); !s.last.Equal(first) {
			t.Error("it goes to the scheduler each time")
		}
		time.Sleep(1 * time.Nanosecond)
		if s.Woke(); s.last.Equal(first) {
			t.Error("it went to the scheduler only once")
		}
	})
	var s Sleeper
	if n := testing.AllocsPerRun(100, s.Woke); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
