// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"testing"
	"time"
)

// TestMonitoringRatios: a ratio compares two moves of the same round.
func TestMonitoringRatios(t *testing.T) {
	var r monitoringReport
	for i, w := range watchers {
		of := &watcherMovements{Name: w.name, Spread: map[string]*spread{}, Ratio: map[string]*spread{}}
		for round := 1; round <= 3; round++ {
			m := watchedMove{faultMean: time.Duration(round*100*(i+1)) * time.Microsecond, faults: 10}
			m.FaultP50, m.FaultP99, m.Downtime, m.CPUDaemons = m.faultMean, m.faultMean, m.faultMean, m.faultMean
			of.add(m, 4)
		}
		r.Watchers = append(r.Watchers, of)
	}
	r.finish()
	for i, w := range r.Watchers {
		if ratio := w.Ratio["fault_mean"]; w.Reads != 12 || ratio.Min != float64(i+1) || ratio.Max != float64(i+1) {
			t.Errorf("%s: %d reads, ratio %v", w.Name, w.Reads, ratio)
		}
	}
	var out strings.Builder
	if err := r.print(&out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"a page open", "fault_p99, µs", "200.00 (100.00–300.00)", "4.00 (4.00–4.00)"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing in\n%s", want, out.String())
		}
	}
}
