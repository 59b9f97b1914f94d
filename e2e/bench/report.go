// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"text/tabwriter"
)

// benchReport is report.json.
type benchReport struct {
	QEMU   string        `json:"qemu"` // its version
	Rounds int           `json:"rounds"`
	Cases  []*caseReport `json:"cases"`
}

func newReport(o options) *benchReport { return &benchReport{QEMU: o.qemu, Rounds: o.rounds} }

// caseReport has a spread for each contender and measure. Ratio is ours / qemu_preempt, of the medians; a measure that
// one of them has not is left out.
type caseReport struct {
	Network string             `json:"network"`
	Guest   string             `json:"guest"`
	Ours    map[string]*spread `json:"ours"`
	QEMU    map[string]*spread `json:"qemu"`
	Preempt map[string]*spread `json:"qemu_preempt"`
	Ratio   map[string]float64 `json:"ratio"`

	speeds map[string][][]float64 // of the guest, by contender and move
}

// A spread is what the rounds have shown of one measure.
type spread struct {
	Median float64   `json:"median"`
	Min    float64   `json:"min"`
	Max    float64   `json:"max"`
	All    []float64 `json:"all"`
}

// finish computes the median and the rest.
func (s *spread) finish() {
	s.Median, s.Min, s.Max = median(s.All), slices.Min(s.All), slices.Max(s.All)
}

func (s *spread) String() string { return fmt.Sprintf("%.2f (%.2f–%.2f)", s.Median, s.Min, s.Max) }

// A measure is a figure that is compared. Less is better for all of them.
type measure struct {
	name, unit string
	of         func(figures) float64
	has        func(guestLoad) bool // nil: every guest has it
}

func visits(g guestLoad) bool   { return !g.idle }
func isPinged(g guestLoad) bool { return g.pinged }

var measures = []measure{
	{"downtime", "ms", func(f figures) float64 { return ms(f.Downtime) }, nil},
	{"ping_gap", "ms", func(f figures) float64 { return ms(f.PingGap) }, isPinged},
	{"pings_lost", "", func(f figures) float64 { return float64(f.PingsLost) }, isPinged},
	{"announced", "ms", func(f figures) float64 { return ms(f.Announced) }, isPinged},
	{"stall_p50", "ms", func(f figures) float64 { return ms(f.StallP50) }, visits},
	{"stall_p99", "ms", func(f figures) float64 { return ms(f.StallP99) }, visits},
	{"stall_p999", "ms", func(f figures) float64 { return ms(f.StallP999) }, visits},
	{"stall_max", "ms", func(f figures) float64 { return ms(f.StallMax) }, visits},
	{"time_to_90", "ms", func(f figures) float64 { return ms(f.TimeTo90) }, visits},
	{"residency", "ms", func(f figures) float64 { return ms(f.Residency) }, nil},
	{"bytes", "MB", func(f figures) float64 { return float64(f.Bytes) / 1e6 }, nil},
	{"cpu", "s", func(f figures) float64 { return f.CPU.Seconds() }, nil},
}

// label is the name and the unit, as tables have it.
func (m measure) label() string {
	if m.unit == "" {
		return m.name
	}
	return m.name + ", " + m.unit
}

func newCaseReport(c benchCase) *caseReport {
	r := &caseReport{
		Network: c.network.name, Guest: c.guest.name, Ratio: map[string]float64{}, speeds: map[string][][]float64{},
		Ours: map[string]*spread{}, QEMU: map[string]*spread{}, Preempt: map[string]*spread{},
	}
	for _, m := range measures {
		if m.has != nil && !m.has(c.guest) {
			continue
		}
		for _, who := range contenders {
			r.of(who.name)[m.name] = &spread{}
		}
	}
	return r
}

func (r *caseReport) of(name string) map[string]*spread {
	switch name {
	case ours:
		return r.Ours
	case qemuPreempt:
		return r.Preempt
	default:
		return r.QEMU
	}
}

func (r *caseReport) add(who contender, f figures) {
	for _, m := range measures {
		if s := r.of(who.name)[m.name]; s != nil {
			s.All = append(s.All, m.of(f))
		}
	}
	r.speeds[who.name] = append(r.speeds[who.name], f.Speed)
}

// finish computes medians and ratios.
func (r *caseReport) finish() {
	for _, who := range contenders {
		for s := range maps.Values(r.of(who.name)) {
			s.finish()
		}
	}
	for name, s := range r.Ours {
		if theirs := r.Preempt[name].Median; theirs > 0 {
			r.Ratio[name] = s.Median / theirs
		}
	}
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return (sorted[(len(sorted)-1)/2] + sorted[len(sorted)/2]) / 2
}

func (r *caseReport) print(out io.Writer) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "%s/%s\tours\tqemu\tqemu_preempt\tours / qemu_preempt\n", r.Network, r.Guest)
	for _, m := range measures {
		if r.Ours[m.name] == nil {
			continue
		}
		fmt.Fprint(w, m.label())
		for _, who := range contenders {
			fmt.Fprintf(w, "\t%v", r.of(who.name)[m.name])
		}
		fmt.Fprintf(w, "\t%s\n", ratio(r.Ratio, m))
	}
	_ = w.Flush() // standard output; there is nobody else to tell
}

// ratio is that of a measure as tables have it; what is divided by nothing has none.
func ratio(ratios map[string]float64, m measure) string {
	r, ok := ratios[m.name]
	if !ok {
		return "–"
	}
	return fmt.Sprintf("%.2f", r)
}

// write writes report.json and report.html.
func (r *benchReport) write(dir string) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "report.json"), append(data, '\n'), 0o644); err != nil {
		return err
	}
	return r.writeHTML(filepath.Join(dir, "report.html"))
}
