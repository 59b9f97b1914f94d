// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// measured returns the report of a case in which the contenders take d, 2d, 3d and so on.
func measured(c benchCase, change func(who string, f *figures)) *caseReport {
	result := newCaseReport(c)
	result.Rounds = 2
	for i, who := range c.contenders() {
		for round := range 2 {
			d := time.Duration(i+1) * time.Millisecond * time.Duration(round+1)
			f := figures{
				Downtime: d, Residency: d, Bytes: uint64(d), CPU: d, Took: time.Second,
				StallP50: d, StallP99: d, StallP999: d, StallMax: d, TimeTo90: d, Speed: []float64{0.1, 0.5, 1},
			}
			if change != nil {
				change(who.name, &f)
			}
			result.add(who, f)
		}
	}
	result.finish()
	return result
}

// aCase returns the case of that name.
func aCase(t *testing.T, name string) benchCase {
	t.Helper()
	for _, c := range cases([]string{"7.2"}) {
		if c.name() == name {
			return c
		}
	}
	t.Fatalf("there is no case %s", name)
	return benchCase{}
}

func TestReport(t *testing.T) {
	r := newReport(options{rounds: 2, versions: []string{"7.2"}})
	result := measured(aCase(t, "loopback/random"), func(who string, f *figures) {
		switch who {
		case ours:
			f.Faults = []uint64{0, 3, 1}
			f.Steps = []stepTime{{"save", time.Millisecond}, {"continue", 2 * time.Millisecond}}
		case qemuPreempt:
			f.Faults = []uint64{0, 0, 0, 0, 5}
		}
	})
	r.Cases = append(r.Cases, result)
	r.Failed, r.Skipped = []string{"a < b"}, []string{"c"}
	r.Balloon = newKindsReport("7.2", networks[0], balloonKinds)
	for i, kind := range balloonKinds {
		r.Balloon.add(kind.name, figures{StallP99: time.Duration(i+1) * time.Millisecond})
	}
	r.Balloon.finish()
	dir := t.TempDir()
	if err := r.write(dir); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(dir, "report.json"))
	if err != nil {
		t.Fatal(err)
	}
	var read struct {
		Targets []verdict
		Cases   []struct {
			QEMU, Network, Guest string
			Rounds               int
			By                   map[string]map[string]spread
			Ratio                map[string]map[string]float64
			Faults               map[string][]uint64
			Steps                map[string][]stepSpread
		}
	}
	if err := json.Unmarshal(text, &read); err != nil || len(read.Cases) != 1 || len(read.Targets) != len(targets) {
		t.Fatalf("%v: %s", err, text)
	}
	got := read.Cases[0]
	if got.By[ours]["downtime"].Median != 1.5 || got.By[ours]["downtime"].Max != 2 ||
		got.By[qemuPlain]["downtime"].Median != 4.5 || got.By[qemuPreempt]["downtime"].Median != 6 {
		t.Errorf("medians %+v", got.By)
	}
	if _, has := got.By[still]["downtime"]; has {
		t.Error("a VM that is not moved has a downtime")
	}
	for _, key := range []string{"downtime", "stall_p99", "stall_max", "time_to_90", "residency", "bytes", "cpu"} {
		if ratio := got.Ratio[plainPair.String()][key]; ratio < 0.24 || ratio > 0.26 {
			t.Errorf("ratio of %s is %v, want a quarter", key, ratio)
		}
		if ratio := got.Ratio[tlsPair.String()][key]; ratio < 0.39 || ratio > 0.41 {
			t.Errorf("with TLS ratio of %s is %v, want two fifths", key, ratio)
		}
	}
	if !slices.Equal(got.Faults[ours], []uint64{0, 6, 2}) || len(got.Steps[ours]) != 2 ||
		got.Steps[ours][1].Spread.Median != 2 {
		t.Errorf("faults %v, steps %+v", got.Faults, got.Steps)
	}
	pageText, err := os.ReadFile(filepath.Join(dir, "report.html"))
	if err != nil || strings.Count(string(pageText), "<svg") != 2 {
		t.Errorf("%v; the page has %d pictures, want 2", err, strings.Count(string(pageText), "<svg"))
	}
	for _, words := range []string{
		"Must show", "QEMU 7.2, loopback/random", "a &lt; b", "no time for: c", "balloon-reporting / no-balloon", "2µs–4µs",
		"continue 2.00", "not moved", "of UFFDIO_COPY&#39;s rate</td><td>≥ 0.8</td><td>–</td><td>not measured",
	} {
		if !strings.Contains(string(pageText), words) {
			t.Errorf("the page does not say %q", words)
		}
	}
	var printed strings.Builder
	if err := result.print(&printed); err != nil {
		t.Fatal(err)
	}
	for _, words := range []string{"1.50 (1.00–2.00)", "75.0", "continue 2.00"} {
		if !strings.Contains(printed.String(), words) {
			t.Errorf("it does not print %q:\n%s", words, printed.String())
		}
	}
}
