// SPDX-License-Identifier: Apache-2.0

package main

import (
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// Figures are printed once an interval, and go on when the daemon's clock is put back by years.
func TestThrottledWhenTheClockGoesBack(t *testing.T) {
	printed := 0
	display := &throttled{interval: time.Second, print: func(*migratedv1.Migration) { printed++ }}
	at := time.Now()
	for _, c := range []struct {
		after time.Duration
		want  int
	}{{0, 1}, {time.Millisecond, 1}, {-3 * 8760 * time.Hour, 2}, {-3*8760*time.Hour + time.Millisecond, 2}, {3 * 8760 * time.Hour, 3}} {
		display.show(&migratedv1.Migration{UpdateTime: timestamppb.New(at.Add(c.after))})
		if printed != c.want {
			t.Errorf("%v later: printed %d times, want %d", c.after, printed, c.want)
		}
	}
}
