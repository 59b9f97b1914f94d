// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/lab"
)

func TestChoose(t *testing.T) {
	for _, c := range []struct {
		size, match string
		versions    []string
		want        int
	}{
		{size: "look", want: 1},
		{size: "short", want: 8},
		{size: "full", want: 39},
		{size: "devices", want: 6},
		{size: "short", match: "^loopback/", want: 26},
		{size: "full", match: "random$", versions: []string{"10.0"}, want: 5},
		{size: "short", match: "devices-8", versions: []string{"7.2"}, want: 10},
		{size: "short", match: "then", versions: []string{"7.2"}, want: 1},
		{size: "short", match: "^microbench$"},
		{size: "short", match: "^balloon$"},
	} {
		o, err := options{size: c.size, match: c.match, versions: c.versions, devices: 1}.complete()
		if err != nil {
			t.Fatal(err)
		}
		chosen, err := choose(o)
		if err != nil || len(chosen) != c.want {
			t.Errorf("choose(%q, %q) = %v, %v; want %d cases", c.size, c.match, chosen, err, c.want)
		}
	}
	for _, match := range []string{"(", "avian"} {
		if _, err := choose(options{size: "short", match: match, versions: []string{"7.2"}}); err == nil {
			t.Errorf("choose(%q) accepts it", match)
		}
	}
}

func TestOptions(t *testing.T) {
	o, err := options{devices: 1}.complete()
	if err != nil || o.size != "short" || o.rounds != 3 || o.minutes != 25 ||
		!slices.Equal(o.versions, []string{"7.2", "10.0"}) {
		t.Errorf("%+v, %v", o, err)
	}
	o, err = options{devices: 1, steps: true}.complete()
	if err != nil || o.size != "devices" || o.rounds != 5 || o.qemu != "7.2" || len(o.versions) != 1 {
		t.Errorf("with --steps %+v, %v", o, err)
	}
	for _, o := range []options{
		{devices: 1, size: "medium"},
		{devices: 1, rounds: -1},
		{devices: 1, minutes: -1},
		{devices: 1, soak: -1},
		{devices: 0},
		{devices: 1, versions: []string{"6.0"}},
		{devices: 1, memory: true, versions: []string{"7.2", "10.0"}},
	} {
		if _, err := o.complete(); err == nil {
			t.Errorf("%+v is accepted", o)
		}
	}
}

// A part that is no case runs when the size has it, or when --case names it.
func TestWants(t *testing.T) {
	for _, c := range []struct {
		o    options
		size bool
		want bool
	}{
		{options{}, true, true},
		{options{}, false, false},
		{options{figure: true}, true, false},
		{options{match: "^micro"}, false, true},
		{options{match: "^loopback"}, true, false},
	} {
		if got := c.o.wants(microPart, c.size); got != c.want {
			t.Errorf("%+v wants it: %t", c.o, got)
		}
	}
}

// Each contender moves the VM in each round, and each is first in some round.
func TestOrder(t *testing.T) {
	all := benchCase{}.contenders()
	first := map[string]bool{}
	for round := range all {
		of := order(all, round)
		seen := map[string]bool{}
		for _, who := range of {
			seen[who.name] = true
		}
		if len(seen) != len(all) {
			t.Errorf("round %d has %v", round, seen)
		}
		first[of[0].name] = true
		if round == 1 && of[1].name != all[0].name {
			t.Errorf("the second round goes on the same way: %s after %s", of[1].name, of[0].name)
		}
	}
	if len(first) != len(all) {
		t.Errorf("only %v begin", first)
	}
	if few := (benchCase{devices: true}).contenders(); len(few) != 3 || few[0].name != ours {
		t.Errorf("without TLS %v", few)
	}
}

// A run ends in time: each part gets its share of the time that is left, and a part that would begin too late is left
// out. A part that fails does not end the others.
func TestRunIsBounded(t *testing.T) {
	var until []time.Time
	of := func(name string, err error) part {
		return part{name, func(_ context.Context, u time.Time) error {
			until = append(until, u)
			return err
		}}
	}
	r := newReport(options{minutes: 60})
	began := time.Now()
	parts := []part{of("a", nil), of("b", errors.New("torn")), of("c", nil)}
	err := r.measure(t.Context(), options{minutes: 60, dir: t.TempDir()}, parts)
	if err == nil || len(r.Failed) != 1 || !strings.Contains(r.Failed[0], "b: torn") || len(until) != 3 {
		t.Fatalf("%v, %v, %v", err, r.Failed, until)
	}
	if first := until[0].Sub(began); first < 19*time.Minute || first > 21*time.Minute {
		t.Errorf("the first of three parts has %v of an hour", first)
	}
	if last := until[2].Sub(began); last < 59*time.Minute || last > 61*time.Minute {
		t.Errorf("the last part has until %v", last)
	}
	late := newReport(options{})
	if err := late.measure(t.Context(), options{minutes: -1, dir: t.TempDir()}, []part{of("d", nil)}); err != nil ||
		!slices.Equal(late.Skipped, []string{"d"}) || len(until) != 3 {
		t.Errorf("%v, skipped %v", err, late.Skipped)
	}
}

// guestLines are reports of a guest that does 100 operations in each window before the switch, and as many as after
// says in each window after it.
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
		say(100, report.Histogram{report.Bucket(1e9): 100}, 1e6) // from before the switch: must not count
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
	if err := f.ofGuest(guestLines(switched, slow...), switched.Add(-2*window), switched, c); err != nil {
		t.Fatal(err)
	}
	if f.StallP50 > 1200*time.Nanosecond ||
		f.StallP99 < 5*time.Millisecond || f.StallP99 > 6*time.Millisecond || f.StallMax != 7*time.Millisecond {
		t.Errorf("stalls %v, %v, %v", f.StallP50, f.StallP99, f.StallMax)
	}
	if f.TimeTo90 < 7*window || f.TimeTo90 > 9*window {
		t.Errorf("back at 90 %% after %v, was slow for %v", f.TimeTo90, 8*window)
	}
	if len(f.Speed) != len(slow)-1 || f.Speed[0] < 0.09 || f.Speed[0] > 0.11 || f.Speed[20] < 0.99 {
		t.Errorf("speeds %v", f.Speed)
	}
	never := figures{}
	err := never.ofGuest(guestLines(switched, slices.Repeat([]uint64{10}, 40)...), switched.Add(-2*window), switched, c)
	if err != nil || never.TimeTo90 != 40*window {
		t.Errorf("a guest that never comes back is back after %v", never.TimeTo90)
	}
	var idle figures
	err = idle.ofGuest(guestLines(switched, slow...), switched, switched, benchCase{guest: guestLoad{idle: true}})
	if err != nil || idle.StallMax != 0 || idle.Speed != nil {
		t.Errorf("an idle guest has %v, %v", idle, err)
	}
	// A guest that stalls as a whole reports late. The report after the late one has its stall, and it counts however late
	// it comes.
	stuck := guestLines(switched, slices.Repeat([]uint64{100}, 40)...)
	for i := range stuck {
		if w := stuck[i].Window; stuck[i].At.After(switched) {
			stuck[i].At = stuck[i].At.Add(3 * time.Second)
			if i > 60 {
				w.UptimeMS += 3000
			}
			if i == 61 {
				w.MaxUS = 3e6
			}
		}
	}
	var late figures
	if err := late.ofGuest(stuck, switched.Add(-2*window), switched, c); err != nil {
		t.Fatal(err)
	}
	if late.TimeTo90 < 3*time.Second || late.TimeTo90 > 3*time.Second+3*window || late.StallMax != 3*time.Second {
		t.Errorf("a guest that stalled for 3 s is back after %v, and has stalled for %v", late.TimeTo90, late.StallMax)
	}
	if err := f.ofGuest(guestLines(switched, 100), switched.Add(-2*window), switched, c); err == nil {
		t.Error("a guest that reported once after the switch has stalls")
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

// TestLegendBesideThePlot: the names of the lines are to the right of all lines.
func TestLegendBesideThePlot(t *testing.T) {
	text, err := os.ReadFile("../../docs/downtime.svg")
	if err != nil {
		t.Fatal(err)
	}
	picture := string(text)
	lines := regexp.MustCompile(
		`<path d="M([\d.]+),[\d.]+((?:L[\d.]+,[\d.]+)+)" style="fill:none;stroke:#[0-9A-F]{6};stroke-width:1.5`,
	)
	var right float64 // of the lines that have points
	found := 0
	for _, line := range lines.FindAllStringSubmatch(picture, -1) {
		points := strings.Split(line[2], "L")[1:]
		if len(points) < 2 { // of the legend
			continue
		}
		found++
		for _, point := range points {
			x, err := strconv.ParseFloat(strings.Split(point, ",")[0], 64)
			if err != nil {
				t.Fatal(err)
			}
			right = max(right, x)
		}
	}
	written := regexp.MustCompile(`<text x="([\d.]+)"[^>]*>(?:migrated|QEMU)[^<]*QEMU`).FindAllStringSubmatch(picture, -1)
	if found != 6 || len(written) != found {
		t.Fatalf("%d lines and %d names of lines", found, len(written))
	}
	for _, w := range written {
		if x, err := strconv.ParseFloat(w[1], 64); err != nil || x <= right {
			t.Errorf("%s is at %s, and lines reach to %.0f", w[0], w[1], right)
		}
	}
}
