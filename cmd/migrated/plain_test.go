// SPDX-License-Identifier: Apache-2.0

package main

import (
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// TestThrottledWhenTheClockGoesBack: figures are printed once an interval, also after the daemon's clock was set back.
func TestThrottledWhenTheClockGoesBack(t *testing.T) {
	printed := 0
	display := &throttled{interval: time.Second, print: func(*migratedv1.Migration) { printed++ }}
	start := time.Now()
	for _, c := range []struct {
		after time.Duration
		want  int
	}{
		{0, 1}, {time.Millisecond, 1}, {-3 * 8760 * time.Hour, 2},
		{-3*8760*time.Hour + time.Millisecond, 2}, {3 * 8760 * time.Hour, 3},
	} {
		display.show(&migratedv1.Migration{UpdateTime: timestamppb.New(start.Add(c.after))})
		if printed != c.want {
			t.Errorf("%v later: printed %d times, want %d", c.after, printed, c.want)
		}
	}
}

func TestWrapped(t *testing.T) {
	for _, c := range []struct {
		line          string
		indent, width int
		want          string
	}{
		{"ok   kernel   it has all that is needed here", 14, 40,
			"ok   kernel   it has all that is needed\n              here"},
		{"ok   kernel   it has all that is needed here", 14, 44, "ok   kernel   it has all that is needed here"},
		{"ok   kernel   it has all that is needed here", 14, 0, "ok   kernel   it has all that is needed here"},
		{"ok   kernel   it has all that is needed here", 14, 30, "ok   kernel   it has all that is needed here"},
		{"  äöüäöüäöüäöüäöüäöüäöüäöü äöü", 2, 22, "  äöüäöüäöüäöüäöüäöüäö\n  üäöü äöü"},
	} {
		if got := wrapped(c.line, c.indent, c.width); got != c.want {
			t.Errorf("%q at %d:\n%s\nwant\n%s", c.line, c.width, got, c.want)
		}
	}
}
