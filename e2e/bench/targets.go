// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"iter"
	"slices"
	"strings"
	"text/tabwriter"
)

// A target is a limit that the engine must keep: each finding is at most the limit, or at least, if atLeast is set.
type target struct {
	name    string
	limit   float64
	unit    string
	atLeast bool
	find    func(*benchReport) []finding
}

// A finding is one value of a target.
type finding struct {
	Where string  `json:"where"`
	Value float64 `json:"value"`
	// Emulator is set if the value shows the emulator rather than the engine.
	Emulator bool `json:"emulator,omitempty"`
}

// A verdict compares a target with its findings. Worst is the finding furthest from the target. Missed are all findings
// that miss it. A target without findings was not measured.
type verdict struct {
	Name    string    `json:"name"`
	Target  string    `json:"target"`
	Limit   float64   `json:"limit"`
	Of      int       `json:"of"` // findings
	Met     bool      `json:"met"`
	Worst   *finding  `json:"worst,omitempty"`
	MissBy  float64   `json:"missed_by,omitempty"` // of the worst, in the unit of the target
	Missed  []finding `json:"missed,omitempty"`
	Unit    string    `json:"unit,omitempty"`
	AtLeast bool      `json:"at_least,omitempty"`
}

// targets are in the order of the report.
var targets = []target{
	{
		name: "2 Gbit/s, 20 ms: the sweep's part of the link, all of the sweep", limit: 0.9, atLeast: true,
		find: ofLink("link_use", onFast),
	},
	{
		name: "2 Gbit/s, 20 ms: the sweep's part of the link, median quarter of a second", limit: 0.9, atLeast: true,
		find: ofLink("link_steady", onFast),
	},
	{
		name: "a path becomes 2 Gbit/s, 20 ms: the sweep uses 90 % of it after", limit: 3, unit: "s",
		find: scaled(1e-3, ofLink("used_well_after", onPath)),
	},
	{
		name: "1 Gbit/s, 10 ms: all memory there, of QEMU's faster one", limit: 1.02,
		find: residency(ours, qemuPlain, qemuPreempt),
	},
	{
		name: "1 Gbit/s, 10 ms: all memory there, TLS, of QEMU's with TLS", limit: 1.02,
		find: residency(oursTLS, qemuPreemptTLS),
	},
	{name: "sweep end to end, of UFFDIO_COPY's rate", limit: 0.8, atLeast: true, find: ofMicro(microSweep)},
	{name: "sweep end to end with TLS, of UFFDIO_COPY's rate", limit: 0.6, atLeast: true, find: ofMicro(microSweepTLS)},
	{name: "network fault p50 with TLS, of that without: the engine alone", limit: 1.25, find: ofMicro(microFaultTLS)},
	{name: "network fault p50 with TLS, of that without: in a VM, random guest", limit: 1.25, find: faultsByTLS},
	{
		name: "stall p99, of preempt's: random guests, loopback", limit: 0.25,
		find: ofPairs("stall_p99", pairs, isRandomOnLoopback),
	},
	{
		name: "stall p99: random guests, loopback", limit: 0.2, unit: "ms",
		find: ofContenders("stall_p99", byUs, isRandomOnLoopback),
	},
	{
		name: "stall p99, of preempt's: sequential guests, everywhere", limit: 1,
		find: ofPairs("stall_p99", pairs, func(c benchCase) bool { return c.guest.name == sequentialName }),
	},
	{name: "longest stall, of preempt's: everywhere", limit: 0.5, find: ofPairs("stall_max", pairs, visits)},
	{
		name: "CPU time, of preempt's: no TLS on either side, everywhere", limit: 1,
		find: ofPairs("cpu", []aPair{plainPair}, func(benchCase) bool { return true }),
	},
	{name: "with a balloon, of without: stall p99", limit: 1.1, find: ofBalloon("stall_p99")},
	{name: "with a balloon, of without: fault p99", limit: 1.1, find: ofBalloon("fault_p99")},
}

func isRandom(c benchCase) bool           { return strings.HasPrefix(c.guest.name, randomName) }
func isRandomOnLoopback(c benchCase) bool { return isRandom(c) && c.network.name == onLoopback }

// meant returns the cases that a target is about. Cases that are moved without TLS only are not among them.
func (r *benchReport) meant(is func(benchCase) bool) iter.Seq[*caseReport] {
	return func(yield func(*caseReport) bool) {
		for _, c := range r.Cases {
			if !c.bench.devices && is(c.bench) && !yield(c) {
				return
			}
		}
	}
}

// ofContenders finds the medians of a measure in the cases that meant accepts.
func ofContenders(name string, who []string, meant func(benchCase) bool) func(*benchReport) []finding {
	return func(r *benchReport) (found []finding) {
		for c := range r.meant(meant) {
			for _, w := range who {
				if s := c.By[w][name]; s != nil && len(s.All) > 0 {
					found = append(found, finding{c.where(w), s.Median, c.decided(name, w)})
				}
			}
		}
		return found
	}
}

// where names a case and the contender.
func (r *caseReport) where(who string) string { return r.String() + ", " + who }

// decided reports whether the emulator decides a measure of one of our contenders.
func (r *caseReport) decided(name, who string) bool {
	for _, p := range r.pairs() {
		if p.ours == who && slices.Contains(r.Emulator[p.String()], name) {
			return true
		}
	}
	return false
}

// ofLink finds a measure of one network's link while a VM without a load is swept.
func ofLink(name, on string) func(*benchReport) []finding {
	return func(r *benchReport) (found []finding) {
		meant := func(c benchCase) bool { return c.network.name == on && c.guest.name == sweepName }
		for _, f := range ofContenders(name, byUs, meant)(r) {
			if f.Value > 0 { // otherwise the sweep was over before the path changed
				found = append(found, f)
			}
		}
		return found
	}
}

func scaled(by float64, find func(*benchReport) []finding) func(*benchReport) []finding {
	return func(r *benchReport) []finding {
		found := find(r)
		for i := range found {
			found[i].Value *= by
		}
		return found
	}
}

// ofPairs finds the ratios of a measure in the cases that meant accepts.
func ofPairs(name string, of []aPair, meant func(benchCase) bool) func(*benchReport) []finding {
	return func(r *benchReport) (found []finding) {
		for c := range r.meant(meant) {
			for _, p := range of {
				if v, ok := c.Ratio[p.String()][name]; ok {
					found = append(found, finding{c.where(p.ours), v, slices.Contains(c.Emulator[p.String()], name)})
				}
			}
		}
		return found
	}
}

// residency finds when the last page comes on the network of the target, divided by the fastest of theirs.
func residency(who string, theirs ...string) func(*benchReport) []finding {
	return func(r *benchReport) (found []finding) {
		for _, c := range r.Cases {
			s := c.By[who]["residency"]
			if c.Network != onFar || s == nil || len(s.All) == 0 {
				continue
			}
			var best float64
			for _, name := range theirs {
				if t := c.By[name]["residency"]; t != nil && len(t.All) > 0 && (best == 0 || t.Median < best) {
					best = t.Median
				}
			}
			if best > 0 && !c.bench.devices {
				found = append(found, finding{c.where(who), s.Median / best, c.decided("residency", who)})
			}
		}
		return found
	}
}

// faultsByTLS finds what TLS costs a fault of a guest that touches its memory at random.
func faultsByTLS(r *benchReport) (found []finding) {
	for _, c := range r.Cases {
		with, without := c.By[oursTLS]["fault_p50"], c.By[ours]["fault_p50"]
		if with == nil || without == nil || !isRandom(c.bench) || len(with.All) == 0 || without.Median <= 0 {
			continue
		}
		found = append(found, finding{Where: c.String(), Value: with.Median / without.Median})
	}
	return found
}

func ofMicro(name string) func(*benchReport) []finding {
	return func(r *benchReport) []finding {
		if r.Micro == nil {
			return nil
		}
		for _, x := range r.Micro.Ratios {
			if x.Name == name {
				return []finding{{Where: fmt.Sprintf("e2e/floor, %.2f–%.2f", x.Low, x.High), Value: x.Value}}
			}
		}
		return nil
	}
}

func ofBalloon(name string) func(*benchReport) []finding {
	return func(r *benchReport) (found []finding) {
		if r.Balloon == nil {
			return nil
		}
		for _, kind := range r.Balloon.Names[1:] {
			if v, ok := r.Balloon.Ratio[kind][name]; ok {
				where := fmt.Sprintf("QEMU %s, %s/%s", r.Balloon.QEMU, r.Balloon.Network, kind)
				found = append(found, finding{Where: where, Value: v})
			}
		}
		return found
	}
}

// judge compares what was measured with the targets.
func judge(r *benchReport) []verdict {
	verdicts := make([]verdict, 0, len(targets))
	for _, t := range targets {
		verdicts = append(verdicts, t.judge(t.find(r)))
	}
	return verdicts
}

func (t target) judge(found []finding) verdict {
	v := verdict{Name: t.name, Limit: t.limit, Unit: t.unit, AtLeast: t.atLeast, Of: len(found)}
	v.Target = map[bool]string{false: "≤ ", true: "≥ "}[t.atLeast] + withUnit(fmt.Sprintf("%g", t.limit), t.unit)
	for _, f := range found {
		if v.Worst == nil || t.missBy(f) > t.missBy(*v.Worst) {
			v.Worst = &f
		}
		if t.missBy(f) > 0 {
			v.Missed = append(v.Missed, f)
		}
	}
	if v.Met = v.Worst != nil && len(v.Missed) == 0; v.Worst != nil && !v.Met {
		v.MissBy = t.missBy(*v.Worst)
	}
	return v
}

// missBy returns by how much a finding misses the limit. It is negative if the finding keeps the limit.
func (t target) missBy(f finding) float64 {
	if t.atLeast {
		return t.limit - f.Value
	}
	return f.Value - t.limit
}

func withUnit(text, unit string) string {
	if unit == "" {
		return text
	}
	return text + " " + unit
}

// Value returns the worst finding's value for tables, Verdict what it means, and Where its case.
func (v verdict) Value() string {
	if v.Worst == nil {
		return none
	}
	return withUnit(fmt.Sprintf("%.2f", v.Worst.Value), v.Unit)
}

func (v verdict) Verdict() string {
	switch {
	case v.Worst == nil:
		return "not measured"
	case v.Met:
		return "met"
	}
	text := "missed by " + withUnit(fmt.Sprintf("%.2g", v.MissBy), v.Unit)
	if v.Of > 1 {
		text += fmt.Sprintf(", in %d of %d", len(v.Missed), v.Of)
	}
	if decided := v.byEmulator(); decided > 0 {
		text += fmt.Sprintf(",%s %d", byEmulator, decided)
	}
	return text
}

// byEmulator returns how many of the misses show the emulator.
func (v verdict) byEmulator() (n int) {
	for _, f := range v.Missed {
		if f.Emulator {
			n++
		}
	}
	return n
}

func (v verdict) Where() string {
	if v.Worst == nil {
		return ""
	}
	if v.Worst.Emulator {
		return v.Worst.Where + byEmulator
	}
	return v.Worst.Where
}

// printTargets prints the targets that were measured. The page has all.
func printTargets(out io.Writer, verdicts []verdict) error {
	measured := slices.DeleteFunc(slices.Clone(verdicts), func(v verdict) bool { return v.Worst == nil })
	if len(measured) == 0 {
		return nil
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "must show, %d of %d measured\ttarget\tworst\t\tof\n", len(measured), len(verdicts))
	for _, v := range measured {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", v.Name, v.Target, v.Value(), v.Verdict(), v.Where())
	}
	return w.Flush()
}
