// SPDX-License-Identifier: Apache-2.0

package qmp

import (
	"strings"
	"testing"
	"time"
)

// TestEventTime: the time of an event can be compared with other times of this process, even if the wall clock was set
// in between.
func TestEventTime(t *testing.T) {
	now := time.Now()
	for name, c := range map[string]struct{ timestamp, want time.Time }{
		"a moment ago":           {now.Add(-3 * time.Millisecond), now.Add(-3 * time.Millisecond)},
		"the clock went back":    {now.AddDate(3, 0, 0), now},
		"the clock went forward": {now.AddDate(-3, 0, 0), now},
		"by an hour":             {now.Add(-time.Hour), now},
		"no time at all":         {time.Unix(0, 0), now},
	} {
		if got := eventTime(c.timestamp.Round(0), now); got.Sub(c.want) != 0 {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
	if got := eventTime(now.Round(0), now); !strings.Contains(got.String(), " m=") {
		t.Error("no reading of the monotonic clock")
	}
}
