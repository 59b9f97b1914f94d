// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/migrated-vm/migrated/e2e/jsonfile"
)

// benchReport is report.json.
type benchReport struct {
	QEMU    []string      `json:"qemu"`    // versions
	Rounds  int           `json:"rounds"`  // of each case, unless the case says less
	Minutes int           `json:"minutes"` // that the run may take
	CPUs    int           `json:"cpus"`
	Kernel  string        `json:"kernel"`
	Targets []verdict     `json:"targets"`
	Cases   []*caseReport `json:"cases"`
	Balloon *kindsReport  `json:"balloon,omitempty"`
	Micro   *microReport  `json:"micro,omitempty"`
	// Failed are parts that failed, and why. Skipped are parts for which there was no time.
	Failed  []string `json:"failed,omitempty"`
	Skipped []string `json:"skipped,omitempty"`
}

func newReport(o options) *benchReport {
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	return &benchReport{
		QEMU: o.versions, Rounds: o.rounds, Minutes: o.minutes,
		CPUs: runtime.NumCPU(), Kernel: strings.TrimSpace(string(kernel)),
	}
}

// caseReport has a spread for each contender and measure that the case has. Ratio is, for each pair, our median divided
// by theirs.
type caseReport struct {
	QEMU    string                        `json:"qemu"` // version
	Network string                        `json:"network"`
	Guest   string                        `json:"guest"`
	Rounds  int                           `json:"rounds"`
	By      map[string]map[string]*spread `json:"by"`
	Ratio   map[string]map[string]float64 `json:"ratio"`
	// Emulator are the measures of each pair that show the emulator: see emulatorDecides.
	Emulator map[string][]string `json:"emulator"`
	// Faults is, by contender, how many faults in all rounds took [2^N, 2^(N+1)) µs, for each N.
	Faults map[string][]uint64 `json:"faults"`
	// Steps are the parts of the downtime, by contender, in order.
	Steps map[string][]stepSpread `json:"steps"`

	bench  benchCase
	speeds map[string][][]float64 // of the guest, by contender and move
}

type stepSpread struct {
	Name   string `json:"name"`
	Spread spread `json:"ms"`
}

// A spread is what the rounds have shown of one measure.
type spread struct {
	Median float64   `json:"median"`
	Min    float64   `json:"min"`
	Max    float64   `json:"max"`
	All    []float64 `json:"all"`
}

// finish computes Median, Min and Max.
func (s *spread) finish() {
	s.Median, s.Min, s.Max = median(s.All), slices.Min(s.All), slices.Max(s.All)
}

func (s *spread) String() string { return fmt.Sprintf("%.2f (%.2f–%.2f)", s.Median, s.Min, s.Max) }

// A measure is a figure that is compared. Less is better, unless more is set.
type measure struct {
	name, unit string
	of         func(figures) float64
	has        func(benchCase) bool // nil: every case has it
	still      stillFigure
	only       []string // contenders that have it; nil: all
	more       bool     // more is better
	// about is set if the figure describes the conditions rather than the contender: no contender is better in it.
	about bool
}

// A stillFigure says how a figure of a VM that is not moved compares with that of a moved VM.
type stillFigure int

const (
	notStill  stillFigure = iota // such a VM has no such figure
	asItIs                       // it covers the same time
	byTime                       // it grows with the time of the measurement
	ofBareTCP                    // it is what bare TCP makes of the link
)

func visits(c benchCase) bool   { return !c.guest.idle }
func isPinged(c benchCase) bool { return c.guest.pinged }
func isLinked(c benchCase) bool { return c.network.link != nil }

// triesLink reports whether bare TCP is tried as well. It is not tried beside a guest whose stalls count.
func triesLink(c benchCase) bool { return isLinked(c) && c.guest.name == sweepName }

var byUs = []string{ours, oursTLS}

var measures = []measure{
	{name: "downtime", unit: "ms", of: func(f figures) float64 { return ms(f.Downtime) }},
	{name: "ping_gap", unit: "ms", of: func(f figures) float64 { return ms(f.PingGap) }, has: isPinged, still: asItIs},
	{name: "pings_lost", of: func(f figures) float64 { return float64(f.PingsLost) }, has: isPinged, still: asItIs},
	{name: "announced", unit: "ms", of: func(f figures) float64 { return ms(f.Announced) }, has: isPinged},
	{name: "stall_p50", unit: "ms", of: func(f figures) float64 { return ms(f.StallP50) }, has: visits, still: asItIs},
	{name: "stall_p99", unit: "ms", of: func(f figures) float64 { return ms(f.StallP99) }, has: visits, still: asItIs},
	{name: "stall_p999", unit: "ms", of: func(f figures) float64 { return ms(f.StallP999) }, has: visits, still: asItIs},
	{name: "stall_max", unit: "ms", of: func(f figures) float64 { return ms(f.StallMax) }, has: visits, still: asItIs},
	{name: "time_to_90", unit: "ms", of: func(f figures) float64 { return ms(f.TimeTo90) }, has: visits, still: asItIs},
	{name: "fault_p50", unit: "µs", of: func(f figures) float64 { return ms(f.FaultP50) * 1000 }, only: byUs},
	{name: "fault_p99", unit: "µs", of: func(f figures) float64 { return ms(f.FaultP99) * 1000 }, only: byUs},
	{name: "residency", unit: "ms", of: func(f figures) float64 { return ms(f.Residency) }},
	{
		name: "link_use", of: func(f figures) float64 { return f.LinkUse }, has: isLinked, still: ofBareTCP, more: true,
	},
	{
		name: "link_steady", of: func(f figures) float64 { return f.LinkSteady }, has: isLinked, still: ofBareTCP, more: true,
	},
	{
		name: "used_well_after", unit: "ms", of: func(f figures) float64 { return ms(f.UsedWellAfter) },
		has: isLinked, still: ofBareTCP,
	},
	{name: "bytes", unit: "MB", of: func(f figures) float64 { return float64(f.Bytes) / 1e6 }},
	{name: "cpu", unit: "s", of: func(f figures) float64 { return f.CPU.Seconds() }, still: byTime},
	{name: "took", unit: "s", of: func(f figures) float64 { return f.Took.Seconds() }, still: asItIs, about: true},
	{name: "busy", of: func(f figures) float64 { return f.Machine.Busy }, still: asItIs, about: true},
	{name: "emulation", of: func(f figures) float64 { return f.Machine.Emulation }, still: asItIs, about: true},
	{name: "others", of: func(f figures) float64 { return f.Machine.Others }, still: asItIs, about: true},
}

// label returns the name and the unit for tables.
func (m measure) label() string {
	if m.unit == "" {
		return m.name
	}
	return m.name + ", " + m.unit
}

// belongs reports whether a contender has the measure in a case.
func (m measure) belongs(c benchCase, who string) bool {
	switch {
	case m.has != nil && !m.has(c):
		return false
	case m.only != nil && !slices.Contains(m.only, who):
		return false
	default:
		return who != still || m.still != notStill && (m.still != ofBareTCP || triesLink(c))
	}
}

func newCaseReport(c benchCase) *caseReport {
	r := &caseReport{
		QEMU: c.qemu, Network: c.network.name, Guest: c.guest.name, bench: c, speeds: map[string][][]float64{},
		By: map[string]map[string]*spread{}, Ratio: map[string]map[string]float64{}, Emulator: map[string][]string{},
		Faults: map[string][]uint64{}, Steps: map[string][]stepSpread{},
	}
	for _, who := range c.contenders() {
		r.By[who.name] = map[string]*spread{}
		for _, m := range measures {
			if m.belongs(c, who.name) {
				r.By[who.name][m.name] = &spread{}
			}
		}
	}
	return r
}

func (r *caseReport) String() string { return r.bench.String() }

func (r *caseReport) add(who contender, f figures) {
	for _, m := range measures {
		if s := r.By[who.name][m.name]; s != nil {
			s.All = append(s.All, m.of(f))
		}
	}
	r.speeds[who.name] = append(r.speeds[who.name], f.Speed)
	if f.Faults != nil {
		r.Faults[who.name] = addFaults(r.Faults[who.name], f.Faults)
	}
	steps := r.Steps[who.name]
	for i, step := range f.Steps {
		if i == len(steps) {
			steps = append(steps, stepSpread{Name: step.name})
		}
		steps[i].Spread.All = append(steps[i].Spread.All, ms(step.took))
	}
	r.Steps[who.name] = steps
}

// finish computes medians and ratios, and which measures the emulator decides.
func (r *caseReport) finish() {
	for _, of := range r.By {
		for s := range maps.Values(of) {
			s.finish()
		}
	}
	for _, steps := range r.Steps {
		for i := range steps {
			steps[i].Spread.finish()
		}
	}
	for _, p := range pairs {
		if r.By[p.ours] == nil || r.By[p.theirs] == nil {
			continue
		}
		r.Ratio[p.String()] = map[string]float64{}
		for _, m := range measures {
			a, b := r.By[p.ours][m.name], r.By[p.theirs][m.name]
			if a == nil || b == nil || b.Median <= 0 || m.about {
				continue
			}
			r.Ratio[p.String()][m.name] = a.Median / b.Median
			if r.emulatorDecides(m, p) {
				r.Emulator[p.String()] = append(r.Emulator[p.String()], m.name)
			}
		}
	}
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return (sorted[(len(sorted)-1)/2] + sorted[len(sorted)/2]) / 2
}

func (r *caseReport) print(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprint(w, r)
	for _, who := range r.bench.contenders() {
		fmt.Fprintf(w, "\t%s", who.name)
	}
	for _, p := range r.pairs() {
		fmt.Fprintf(w, "\t%s", p)
	}
	fmt.Fprintln(w)
	for _, m := range measures {
		if r.By[ours][m.name] == nil {
			continue
		}
		fmt.Fprint(w, m.label())
		for _, who := range r.bench.contenders() {
			fmt.Fprintf(w, "\t%s", r.cell(who.name, m))
		}
		for _, p := range r.pairs() {
			fmt.Fprintf(w, "\t%s", r.ratio(p, m))
		}
		fmt.Fprintln(w)
	}
	if faults := r.faultTable(); len(faults.Rows) > 0 {
		fmt.Fprint(w, "\nfaults, in % of so many")
		for i, who := range faults.Who {
			fmt.Fprintf(w, "\t%s: %d", who, faults.Of[i])
		}
		fmt.Fprintln(w)
		for _, row := range faults.Rows {
			fmt.Fprintf(w, "%s\t%s\n", row.Bucket, strings.Join(row.Parts, "\t"))
		}
	}
	fmt.Fprintln(w, "\ndowntime by step, ms")
	for _, who := range r.bench.contenders() {
		if len(r.Steps[who.name]) == 0 {
			continue
		}
		fmt.Fprint(w, who.label)
		for _, step := range r.Steps[who.name] {
			fmt.Fprintf(w, "\t%s %.2f", strings.TrimSpace(step.Name), step.Spread.Median)
		}
		fmt.Fprintln(w)
	}
	return w.Flush()
}

// pairs returns the pairs that the case has.
func (r *caseReport) pairs() []aPair {
	return slices.DeleteFunc(slices.Clone(pairs), func(p aPair) bool { return r.Ratio[p.String()] == nil })
}

// cell returns a contender's figure of a measure for tables.
func (r *caseReport) cell(who string, m measure) string {
	s := r.By[who][m.name]
	if s == nil || len(s.All) == 0 {
		return none
	}
	return s.String()
}

// none stands in tables where there is no figure. byEmulator marks what the emulator decides.
const (
	none       = "–"
	byEmulator = " ◆"
)

// ratio returns the ratio of a pair's measure for tables.
func (r *caseReport) ratio(p aPair, m measure) string {
	text := ratio(r.Ratio[p.String()], m)
	if slices.Contains(r.Emulator[p.String()], m.name) {
		text += byEmulator
	}
	return text
}

// ratio returns the ratio of a measure for tables. There is none if the divisor was zero.
func ratio(ratios map[string]float64, m measure) string {
	r, ok := ratios[m.name]
	if !ok {
		return none
	}
	return fmt.Sprintf("%.2f", r)
}

// write writes report.json and report.html.
func (r *benchReport) write(dir string) error {
	r.Targets = judge(r)
	if err := jsonfile.Write(filepath.Join(dir, "report.json"), r); err != nil {
		return err
	}
	return r.writeHTML(filepath.Join(dir, "report.html"))
}
