// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/lab"
)

func TestChoose(t *testing.T) {
	for _, c := range []struct {
		size, match string
		want        int
	}{
		{"short", "", 5}, {"full", "", 26}, {"devices", "", 6}, {"short", "^loopback/", 13}, {"full", "random$", 4},
		{"short", "devices-8", 8},
	} {
		chosen, err := choose(c.size, c.match)
		if err != nil || len(chosen) != c.want {
			t.Errorf("choose(%q, %q) = %v, %v; want %d cases", c.size, c.match, names(chosen), err, c.want)
		}
	}
	for _, c := range [][2]string{{"medium", ""}, {"short", "("}, {"short", "avian"}} {
		if _, err := choose(c[0], c[1]); err == nil {
			t.Errorf("choose(%q, %q) accepts it", c[0], c[1])
		}
	}
}

// A VM that came by postcopy-preempt must not be moved on by plain post-copy, whichever rounds follow each other.
func TestOrder(t *testing.T) {
	last := ""
	for round := range 4 {
		seen := map[string]bool{}
		for _, who := range order(round) {
			if seen[who.name] = true; who.name == "qemu" && last == qemuPreempt {
				t.Errorf("round %d: %s right after %s", round, who.name, last)
			}
			last = who.name
		}
		if len(seen) != len(contenders) {
			t.Errorf("round %d has %v", round, seen)
		}
	}
}

// guestLines are reports of a guest that does 100 operations in each window, but only so many in those after the switch.
func guestLines(switched time.Time, after ...uint64) []report.Line {
	var lines []report.Line
	total, first := uint64(0), switched.Add(-60*window)
	say := func(ops uint64, latencies report.Histogram, slowest int64) {
		i := len(lines) + 1
		total += ops
		lines = append(lines, report.Line{At: first.Add(time.Duration(i) * window), Window: &report.Window{
			Counters: report.Counters{UptimeMS: int64(i) * window.Milliseconds(), TotalOps: total},
			Ops:      ops, Latencies: latencies, MaxUS: slowest,
		}})
	}
	for range 60 {
		say(100, report.Histogram{report.Bucket(1e9): 100}, 1e6) // from before: must not count
	}
	for _, ops := range after {
		say(ops, report.Histogram{report.Bucket(1000): 98, report.Bucket(5e6): 2}, 7000)
	}
	return lines
}

func TestFiguresOfGuest(t *testing.T) {
	switched := time.Now()
	c := benchCase{guest: guestLoad{name: "test"}}
	slow := append(slices.Repeat([]uint64{10}, 8), slices.Repeat([]uint64{100}, 40)...)
	var f figures
	f.ofGuest(guestLines(switched, slow...), switched.Add(-2*window), switched, c)
	if f.StallP50 > 1200*time.Nanosecond || f.StallP99 < 5*time.Millisecond || f.StallP99 > 6*time.Millisecond || f.StallMax != 7*time.Millisecond {
		t.Errorf("stalls %v, %v, %v", f.StallP50, f.StallP99, f.StallMax)
	}
	if f.TimeTo90 < 7*window || f.TimeTo90 > 9*window {
		t.Errorf("back at 90 %% after %v, was slow for %v", f.TimeTo90, 8*window)
	}
	if len(f.Speed) != len(slow)-1 || f.Speed[0] < 0.09 || f.Speed[0] > 0.11 || f.Speed[20] < 0.99 {
		t.Errorf("speeds %v", f.Speed)
	}
	never := figures{}
	never.ofGuest(guestLines(switched, slices.Repeat([]uint64{10}, 40)...), switched.Add(-2*window), switched, c)
	if never.TimeTo90 != 39*window {
		t.Errorf("a guest that never comes back is back after %v", never.TimeTo90)
	}
	var idle figures
	idle.ofGuest(guestLines(switched, slow...), switched, switched, benchCase{guest: guestLoad{idle: true}})
	if idle.StallMax != 0 || idle.Speed != nil {
		t.Errorf("an idle guest has %v", idle)
	}
}

func TestReport(t *testing.T) {
	c := cases()[1]
	r := newReport(options{rounds: 2})
	result := newCaseReport(c)
	for i, who := range contenders {
		for round := range 2 {
			d := time.Duration(i+1) * time.Millisecond * time.Duration(round+1)
			result.add(who, figures{
				Downtime: d, Residency: d, Bytes: uint64(d), CPU: d, StallP50: d, StallP99: d, StallP999: d, StallMax: d, TimeTo90: d,
				Speed: []float64{0.1, 0.5, 1},
			})
		}
	}
	result.finish()
	r.Cases = append(r.Cases, result)
	dir := t.TempDir()
	if err := r.write(dir); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(dir, "report.json"))
	if err != nil {
		t.Fatal(err)
	}
	var read struct {
		Cases []struct {
			Network, Guest string
			Ours, QEMU     map[string]spread
			Preempt        map[string]spread `json:"qemu_preempt"`
			Ratio          map[string]float64
		}
	}
	if err := json.Unmarshal(text, &read); err != nil || len(read.Cases) != 1 {
		t.Fatalf("%v: %s", err, text)
	}
	got := read.Cases[0]
	if got.Ours["downtime"].Median != 1.5 || got.Ours["downtime"].Max != 2 || got.QEMU["downtime"].Median != 3 || got.Preempt["downtime"].Median != 4.5 {
		t.Errorf("medians %+v", got)
	}
	for _, key := range []string{"downtime", "stall_p99", "stall_max", "time_to_90", "residency", "bytes", "cpu"} {
		if ratio := got.Ratio[key]; ratio < 0.33 || ratio > 0.34 {
			t.Errorf("ratio of %s is %v, want a third", key, ratio)
		}
	}
	pageText, err := os.ReadFile(filepath.Join(dir, "report.html"))
	if err != nil || strings.Count(string(pageText), "<svg") != 2 {
		t.Errorf("%v; the page has %d pictures, want 2", err, strings.Count(string(pageText), "<svg"))
	}
	var printed strings.Builder
	result.print(&printed)
	if !strings.Contains(printed.String(), "1.50 (1.00–2.00)") {
		t.Errorf("printed:\n%s", printed.String())
	}
}

func TestCPUTime(t *testing.T) {
	if _, err := cpuTime("/proc/self/stat"); err != nil {
		t.Error(err)
	}
	path := filepath.Join(t.TempDir(), "stat")
	line := "7 (a) b (c) S 1 7 7 0 -1 4194560 1 2 3 4 150 25 8 9 20 0 1 0 5\n"
	if err := os.WriteFile(path, []byte(line), 0o600); err != nil {
		t.Fatal(err)
	}
	if d, err := cpuTime(path); err != nil || d != 1750*time.Millisecond {
		t.Errorf("%v, %v; want 1.75s", d, err)
	}
	if _, err := vcpuTime(os.Getpid()); err == nil {
		t.Error("a process that is no QEMU has vCPUs")
	}
}

// A line may be cut in two by the switch.
func TestSerialGoesOnElsewhere(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	dir := t.TempDir()
	hosts := []*lab.Host{{}, {}}
	s := &serial{ctx: ctx, files: map[*lab.Host]*os.File{}}
	var writers []*os.File
	for i, h := range hosts {
		w, err := os.Create(filepath.Join(dir, string(rune('a'+i))))
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		r, err := os.Open(w.Name())
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		s.files[h] = r
		writers = append(writers, w)
	}
	s.now = s.files[hosts[0]]
	s.next.Store(s.now)
	for _, step := range []struct {
		writer int
		text   string
	}{{0, "one tw"}, {1, "o three fo"}, {0, "ur"}} {
		if _, err := writers[step.writer].WriteString(step.text); err != nil {
			t.Fatal(err)
		}
		s.follow(hosts[step.writer])
		got := make([]byte, len(step.text))
		if _, err := io.ReadFull(s, got); err != nil || string(got) != step.text {
			t.Fatalf("%q, %v; want %q", got, err, step.text)
		}
	}
	cancel()
	if _, err := s.Read(make([]byte, 1)); err == nil {
		t.Error("it goes on after its end")
	}
}
