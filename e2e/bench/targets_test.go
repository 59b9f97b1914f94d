// SPDX-License-Identifier: Apache-2.0

package main

import (
	"math"
	"slices"
	"strings"
	"testing"
	"time"
)

// verdictOf judges a report and returns the one verdict whose name contains words.
func verdictOf(t *testing.T, r *benchReport, words string) verdict {
	t.Helper()
	var found []verdict
	for _, v := range judge(r) {
		if strings.Contains(v.Name, words) {
			found = append(found, v)
		}
	}
	if len(found) != 1 {
		t.Fatalf("%d targets are called %q", len(found), words)
	}
	return found[0]
}

// near reports whether two values are equal but for binary rounding.
func near(a, b float64) bool { return math.Abs(a-b) < 1e-9 }

func TestJudge(t *testing.T) {
	most, least := target{name: "t", limit: 2, unit: "s"}, target{name: "t", limit: 0.9, atLeast: true}
	for _, c := range []struct {
		what    string
		of      target
		found   []finding
		value   string
		verdict string
	}{
		{"nothing", most, nil, "–", "not measured"},
		{"at the limit", most, []finding{{Where: "a", Value: 2}}, "2.00 s", "met"},
		{"the worst counts", most, []finding{{"a", 1, false}, {"b", 2.5, false}, {"c", 2.25, true}},
			"2.50 s", "missed by 0.5 s, in 2 of 3, ◆ 1"},
		{"one", most, []finding{{"a", 3, false}}, "3.00 s", "missed by 1 s"},
		{"at least", least, []finding{{"a", 0.95, false}, {"b", 0.9, false}}, "0.90", "met"},
		{"less than that", least, []finding{{"a", 0.95, false}, {"b", 0.5, false}}, "0.50", "missed by 0.4, in 1 of 2"},
	} {
		v := c.of.judge(c.found)
		if v.Value() != c.value || v.Verdict() != c.verdict {
			t.Errorf("%s: %q, %q; want %q, %q", c.what, v.Value(), v.Verdict(), c.value, c.verdict)
		}
	}
}

// Targets that were not measured are not printed.
func TestPrintTargets(t *testing.T) {
	var out strings.Builder
	met := target{name: "the met one", limit: 1}.judge([]finding{{Where: "here", Value: 0.5}})
	unmeasured := target{name: "the other one", limit: 1}.judge(nil)
	if err := printTargets(&out, []verdict{met, unmeasured}); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "1 of 2 measured") || !strings.Contains(out.String(), "met  here") ||
		strings.Contains(out.String(), "other") {
		t.Errorf("printed:\n%s", out.String())
	}
	out.Reset()
	if err := printTargets(&out, []verdict{unmeasured}); err != nil || out.Len() > 0 {
		t.Errorf("printed of nothing, %v:\n%s", err, out.String())
	}
}

func TestTargetsOfStallsAndCPU(t *testing.T) {
	set := func(values map[string]time.Duration) func(string, *figures) {
		return func(who string, f *figures) {
			d := values[who]
			f.StallP50, f.StallP99, f.StallP999, f.StallMax, f.CPU = d, d, d, d, d
		}
	}
	fast := set(map[string]time.Duration{
		ours: 100 * time.Microsecond, oursTLS: 300 * time.Microsecond,
		qemuPreempt: time.Millisecond, qemuPreemptTLS: time.Millisecond,
	})
	slow := set(map[string]time.Duration{
		ours: 2 * time.Millisecond, oursTLS: time.Millisecond,
		qemuPreempt: time.Millisecond, qemuPreemptTLS: time.Millisecond,
	})
	r := &benchReport{Cases: []*caseReport{
		measured(aCase(t, "loopback/random"), fast), measured(aCase(t, "10G-0.05ms/sequential"), slow),
		measured(aCase(t, "loopback/devices-8-busy"), slow), measured(aCase(t, "1G-0.2ms/random"), slow),
	}}
	for _, c := range []struct {
		words string
		of    int
		worst float64
		met   bool
	}{
		{"stall p99, of preempt's: random", 2, 0.3, false},
		{"stall p99: random", 2, 0.3, false},
		{"stall p99, of preempt's: sequential", 2, 2, false},
		{"longest stall", 6, 2, false},
		{"CPU time", 3, 2, false}, // not those with TLS, and not the runs of devices
	} {
		v := verdictOf(t, r, c.words)
		if v.Of != c.of || !near(v.Worst.Value, c.worst) || v.Met != c.met {
			t.Errorf("%s: %d findings, worst %+v, met %t", c.words, v.Of, v.Worst, v.Met)
		}
	}
	if v := verdictOf(t, r, "stall p99, of preempt's: sequential"); len(v.Missed) != 1 ||
		v.Missed[0].Where != "QEMU 7.2, 10G-0.05ms/sequential, ours" {
		t.Errorf("missed: %+v", v.Missed)
	}
}

func TestTargetsOfNetworks(t *testing.T) {
	sweep := measured(aCase(t, "2G-20ms/sweep"), func(who string, f *figures) {
		f.LinkUse, f.LinkSteady = 0.88, 0.95
		if who == oursTLS {
			f.LinkUse, f.LinkSteady = 0.91, 0.93
		}
	})
	path := measured(aCase(t, onPath+"/sweep"), func(who string, f *figures) {
		if f.UsedWellAfter = 2500 * time.Millisecond; who == oursTLS {
			f.UsedWellAfter = 0 // it was over before the path changed
		}
	})
	late := measured(aCase(t, "1G-10ms/random"), func(who string, f *figures) {
		took := map[string]int{ours: 1010, oursTLS: 1050, qemuPlain: 1000, qemuPreempt: 1200, qemuPreemptTLS: 1000}
		f.Residency = time.Duration(took[who]) * time.Millisecond
	})
	r := &benchReport{Cases: []*caseReport{sweep, path, late}}
	for _, c := range []struct {
		words string
		of    int
		worst float64
		met   bool
	}{
		{"all of the sweep", 2, 0.88, false},
		{"median quarter", 2, 0.93, true},
		{"a path becomes", 1, 2.5, true},
		{"of QEMU's faster one", 1, 1.01, true},
		{"of QEMU's with TLS", 1, 1.05, false},
	} {
		v := verdictOf(t, r, c.words)
		if v.Of != c.of || v.Worst == nil || !near(v.Worst.Value, c.worst) || v.Met != c.met {
			t.Errorf("%s: %d findings, worst %+v, met %t", c.words, v.Of, v.Worst, v.Met)
		}
	}
}

func TestTargetsOfTheRest(t *testing.T) {
	r := &benchReport{
		Micro: &microReport{Ratios: []microRatio{
			{Name: microSweep, Value: 0.85}, {Name: microSweepTLS, Value: 0.5}, {Name: microFaultTLS, Value: 1.2},
		}},
		Cases: []*caseReport{measured(aCase(t, "loopback/random"), func(who string, f *figures) {
			f.FaultP50 = map[string]time.Duration{ours: 100 * time.Microsecond, oursTLS: 130 * time.Microsecond}[who]
		})},
		Balloon: newKindsReport("7.2", networks[1], balloonKinds),
	}
	for i, kind := range balloonKinds {
		r.Balloon.add(kind.name, figures{
			StallP99: time.Duration(100+5*i) * time.Microsecond, FaultP99: time.Duration(100+20*i) * time.Microsecond,
		})
	}
	r.Balloon.finish()
	for words, want := range map[string]struct {
		worst float64
		met   bool
	}{
		"sweep end to end, of":      {0.85, true},
		"sweep end to end with TLS": {0.5, false},
		"the engine alone":          {1.2, true},
		"in a VM, random guest":     {1.3, false},
		"of without: stall p99":     {1.1, true},
		"of without: fault p99":     {1.4, false},
	} {
		if v := verdictOf(t, r, words); v.Worst == nil || math.Abs(v.Worst.Value-want.worst) > 1e-9 || v.Met != want.met {
			t.Errorf("%s: worst %+v, met %t", words, v.Worst, v.Met)
		}
	}
}

// A figure is the emulator's if a VM that is not moved has at least half of it.
func TestEmulatorDecides(t *testing.T) {
	c := aCase(t, "loopback/random")
	of := func(change func(who string, f *figures)) []string {
		return measured(c, change).Emulator[plainPair.String()]
	}
	stalls := func(unmoved time.Duration) func(string, *figures) {
		return func(who string, f *figures) {
			if f.StallP99 = time.Millisecond; who == still {
				f.StallP99 = unmoved
			}
			f.StallP50, f.StallP999, f.StallMax, f.TimeTo90, f.CPU = time.Hour, time.Hour, time.Hour, time.Hour, time.Hour
			if who == still {
				f.StallP50, f.StallP999, f.StallMax, f.TimeTo90, f.CPU = 1, 1, 1, 1, 1
			}
		}
	}
	if got := of(stalls(600 * time.Microsecond)); !slices.Equal(got, []string{"stall_p99"}) {
		t.Errorf("an unmoved VM stalls for 0.6 of it: the emulator decides %v", got)
	}
	if got := of(stalls(400 * time.Microsecond)); got != nil {
		t.Errorf("an unmoved VM stalls for 0.4 of it: the emulator decides %v", got)
	}
	// The move takes twice as long as the measurement without one.
	cpuTimes := func(unmoved time.Duration) func(string, *figures) {
		return func(who string, f *figures) {
			*f = figures{CPU: time.Second, Took: 4 * time.Second}
			if who == still {
				f.CPU, f.Took = unmoved, 2*time.Second
			}
		}
	}
	if got := of(cpuTimes(300 * time.Millisecond)); !slices.Contains(got, "cpu") {
		t.Errorf("the emulator decides %v", got)
	}
	if got := of(cpuTimes(200 * time.Millisecond)); slices.Contains(got, "cpu") {
		t.Errorf("the emulator decides %v", got)
	}
	busy := func(busy, emulation float64) func(string, *figures) {
		return func(_ string, f *figures) { f.Machine = machineUse{Busy: busy, Emulation: emulation} }
	}
	for _, c := range []struct {
		busy, emulation float64
		want            bool
	}{{1, 0.6, true}, {1, 0.3, false}, {0.8, 0.7, false}} {
		if got := slices.Contains(of(busy(c.busy, c.emulation)), "residency"); got != c.want {
			t.Errorf("%+v: the emulator decides when all memory is there: %t", c, got)
		}
	}
}
