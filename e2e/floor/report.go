// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
)

// report is micro.json.
type report struct {
	CPUs     int              `json:"cpus"`
	Kernel   string           `json:"kernel"`
	Load     string           `json:"load"` // of the machine before
	Rounds   int              `json:"rounds"`
	Ratios   []ratio          `json:"ratios"`
	Sections map[string][]row `json:"sections"`

	samples map[string][]sample
	order   []string // of the sections
}

// row has the medians of one contender. Figures that it does not measure are zero and left out.
type row struct {
	Name        string  `json:"name"`
	What        string  `json:"what"`
	P50         float64 `json:"p50_us,omitempty"`
	P90         float64 `json:"p90_us,omitempty"`
	P99         float64 `json:"p99_us,omitempty"`
	PerSecond   float64 `json:"per_second,omitempty"`
	Inside      float64 `json:"inside_p50_us,omitempty"` // the engine's own median: message read to page installed
	MBPerSecond float64 `json:"mb_per_second,omitempty"` // 10^6 bytes
	Sweep       float64 `json:"sweep_ms,omitempty"`
	RSS         float64 `json:"rss_mib,omitempty"` // peak
	SourceRSS   float64 `json:"source_rss_mib,omitempty"`
	Limit       float64 `json:"limit_rss_mib,omitempty"` // of each
}

// ratio compares contenders round by round.
type ratio struct {
	Name   string  `json:"name"`
	Value  float64 `json:"value"` // median over the rounds
	Low    float64 `json:"low"`
	High   float64 `json:"high"`
	Target string  `json:"target,omitempty"`
	Met    *bool   `json:"met,omitempty"`
}

func newReport(s scale) *report {
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	load, _ := os.ReadFile("/proc/loadavg")
	return &report{
		CPUs: runtime.NumCPU(), Kernel: strings.TrimSpace(string(kernel)), Load: strings.TrimSpace(string(load)),
		Rounds: s.rounds, Sections: map[string][]row{}, samples: map[string][]sample{},
	}
}

func median(samples []sample, of func(sample) float64) float64 {
	all := make([]float64, len(samples))
	for i, s := range samples {
		all[i] = of(s)
	}
	slices.Sort(all)
	return (all[len(all)/2] + all[(len(all)-1)/2]) / 2
}

const mib = 1 << 20

func perSecond(what, ns int64) float64 {
	if ns == 0 {
		return 0
	}
	return float64(what) * 1e9 / float64(ns)
}

func (r *report) add(c contender, samples []sample) {
	x := row{
		Name: c.name, What: c.what,
		P50:    median(samples, func(s sample) float64 { return float64(s.P50) / 1e3 }),
		P90:    median(samples, func(s sample) float64 { return float64(s.P90) / 1e3 }),
		P99:    median(samples, func(s sample) float64 { return float64(s.P99) / 1e3 }),
		Inside: median(samples, func(s sample) float64 { return float64(s.Inside) / 1e3 }),
	}
	switch c.section {
	case "throughput":
		x.MBPerSecond = median(samples, func(s sample) float64 { return perSecond(s.Bytes, s.Wall) / 1e6 })
	case "sizes":
		x.Sweep = median(samples, func(s sample) float64 { return float64(s.Sweep) / 1e6 })
		x.RSS = median(samples, func(s sample) float64 { return float64(s.RSS) / mib })
		x.SourceRSS = median(samples, func(s sample) float64 { return float64(s.Source) / mib })
		var gib float64
		_, _ = fmt.Sscanf(c.name, "%f-gib", &gib) // plan.sizes named it
		x.Limit = 64 + gib*1024/pageSize          // 64 MiB and a byte a page
	default:
		x.PerSecond = median(samples, func(s sample) float64 { return perSecond(s.N, s.Wall) })
	}
	if _, ok := r.Sections[c.section]; !ok {
		r.order = append(r.order, c.section)
	}
	r.Sections[c.section] = append(r.Sections[c.section], x)
	r.samples[c.name] = samples
}

func (r *report) print(to io.Writer) error {
	w := tabwriter.NewWriter(to, 0, 0, 2, ' ', 0)
	for _, section := range r.order {
		fmt.Fprintf(w, "%s\t%s\n", section, heads[section])
		for _, x := range r.Sections[section] {
			fmt.Fprintf(w, "  %s\t", x.Name)
			switch section {
			case "throughput":
				fmt.Fprintf(w, "%.0f", x.MBPerSecond)
			case "sizes":
				fmt.Fprintf(w, "%.1f\t%.1f\t%.0f\t%.1f\t%.1f\t%.1f", x.P50, x.P99, x.Sweep, x.RSS, x.SourceRSS, x.Limit)
			default:
				fmt.Fprintf(w, "%.1f\t%.1f\t%.1f\t%.0f\t", x.P50, x.P90, x.P99, x.PerSecond)
				if x.Inside > 0 {
					fmt.Fprintf(w, "%.1f", x.Inside)
				}
			}
			fmt.Fprintf(w, "\t%s\n", x.What)
		}
		fmt.Fprintln(w)
	}
	fmt.Fprintln(w, "ratios\tmedian\tlowest\thighest\ttarget\t")
	for _, x := range r.Ratios {
		verdict := ""
		if x.Met != nil && !*x.Met {
			verdict = "missed"
		}
		fmt.Fprintf(w, "  %s\t%.2f\t%.2f\t%.2f\t%s\t%s\n", x.Name, x.Value, x.Low, x.High, x.Target, verdict)
	}
	fmt.Fprintf(w, "\n%d rounds, %d CPUs, Linux %s, load before: %s\n", r.Rounds, r.CPUs, r.Kernel, r.Load)
	return w.Flush()
}

// heads are the columns of each section.
var heads = map[string]string{
	"faults":      "p50 µs\tp90 µs\tp99 µs\tfaults/s\tinside µs\t",
	"round_trips": "p50 µs\tp90 µs\tp99 µs\ttrips/s\t\t",
	"throughput":  "MB/s\t",
	"shards":      "p50 µs\tp90 µs\tp99 µs\tfaults/s\tinside µs\t",
	// The engine alone. More userfaultfds would show here if it waited for their locks.
	"shards_alone": "p50 µs\tp90 µs\tp99 µs\tfaults/s\tinside µs\t",
	"sizes":        "p50 µs\tp99 µs\tsweep ms\tengine MiB\tsource MiB\tlimit MiB\t",
}
