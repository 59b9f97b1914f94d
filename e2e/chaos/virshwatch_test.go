// SPDX-License-Identifier: Apache-2.0

package main

import (
	"testing"
	"time"
)

// TestDisagreement: a disagreement is reported once, when it has lasted, and again when it comes again.
func TestDisagreement(t *testing.T) {
	begin := time.Now()
	var d disagreement
	for i, step := range []struct {
		says, is string
		at       time.Duration
		told     bool
	}{
		{"running", "running", 0, false},
		{"running", "paused", time.Second, false},
		{"running", "paused", time.Second + lagging, false},
		{"running", "paused", 2*time.Second + lagging, true},
		{"running", "paused", 3*time.Second + lagging, false},
		{"in shutdown", "paused", 4*time.Second + lagging, false},
		{"running", "", 5*time.Second + lagging, false},
		{"", "", 6*time.Second + lagging, false},
		{"running", "", 7*time.Second + lagging, false},
		{"running", "", 8*time.Second + 2*lagging, true},
	} {
		if told := d.lasts(step.says, step.is, begin.Add(step.at)); told != step.told {
			t.Errorf("step %d: told %v, want %v", i, told, step.told)
		}
	}
}
