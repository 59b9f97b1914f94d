// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"testing"
	"testing/synctest"
	"time"
)

// While the VM runs, the stream goes at the pace of a connection that was idle: what it carries doubles with each round trip.
func TestRamp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const roundTrip, firmware = 10 * time.Millisecond, 16 * deviceChunk
		r := newRamp(make(chan struct{}), roundTrip)
		began := time.Now()
		waits := 0
		for sent := 0; sent < firmware; sent += deviceChunk {
			before := time.Now()
			r.sent(deviceChunk)
			if time.Since(before) > 0 {
				waits++
			}
		}
		if took := time.Since(began); waits != 4 || took != 4*roundTrip { // after 1, 2, 4 and 8 of them
			t.Errorf("%d waits, %v", waits, took)
		}
	})
}

// A round trip that was measured on a bad moment delays nothing for long.
func TestRampIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		newRamp(make(chan struct{}), time.Hour).sent(deviceChunk)
		if took := time.Since(began); took != longestRoundTrip {
			t.Errorf("it waited for %v", took)
		}
	})
}

// From the stop on nothing waits, not even what waits already.
func TestRampEndsWithTheStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stopped := make(chan struct{})
		r := newRamp(stopped, 10*time.Millisecond)
		began := time.Now()
		time.AfterFunc(time.Millisecond, func() { close(stopped) })
		for range 1000 {
			r.sent(deviceChunk)
		}
		if took := time.Since(began); took != time.Millisecond {
			t.Errorf("it took %v", took)
		}
	})
}
