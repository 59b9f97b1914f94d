// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"text/tabwriter"

	"github.com/migrated-vm/migrated/e2e/jsonfile"
	"github.com/migrated-vm/migrated/e2e/lab"
)

// stepsReport is steps.json.
type stepsReport struct {
	QEMU   string       `json:"qemu"` // its version
	Rounds int          `json:"rounds"`
	Cases  []*caseSteps `json:"cases"`
}

// caseSteps are the parts of the downtime of one case.
type caseSteps struct {
	Network string             `json:"network"`
	Guest   string             `json:"guest"`
	Steps   map[string]*spread `json:"steps"`
}

// A step is a part of the downtime, from the daemons' logs.
type step struct {
	name, unit string
	of         func(e entries) (float64, error)
}

// entries are what the two daemons have logged about one move, and the downtime by QEMU's events.
type entries struct {
	early, loaded, switched entry // at the source
	runs                    entry // at the destination
	downtime                float64
}

// The first is the pause of the early load, while the VM is prepared. An indented line is no step of its own: loading
// begins while QEMU saves, and the slowest is one of the faults. The steps from save to cont add up to the whole. Most
// of stop comes before the STOP event, with which the whole begins; the rest of it is in commit.
var steps = []step{
	{"pause before", "ms", func(e entries) (float64, error) { return e.early.duration("pause") }},
	{"stop", "ms", func(e entries) (float64, error) { return e.loaded.duration("stop") }},
	{"save", "ms", func(e entries) (float64, error) { return e.loaded.duration("save") }},
	{"transfer", "ms", func(e entries) (float64, error) { return e.loaded.duration("transfer") }},
	{"  load in all", "ms", func(e entries) (float64, error) { return e.loaded.duration("load") }},
	{"commit", "ms", commitTime},
	{"crossing", "ms", func(e entries) (float64, error) { d, err := e.switched.duration("network"); return d / 2, err }},
	{"cont", "ms", func(e entries) (float64, error) { return e.switched.duration("cont") }},
	{"whole", "ms", func(e entries) (float64, error) { return e.downtime, nil }},
	{"state", "KB", func(e entries) (float64, error) { n, err := e.loaded.number("bytes"); return n / 1e3, err }},
	{"faults until cont", "", func(e entries) (float64, error) { return e.runs.number("faults") }},
	{"  slowest", "ms", func(e entries) (float64, error) { return e.runs.duration("slowest_fault") }},
}

// commitTime returns the rest of the downtime: the source hears of STOP, checks what was saved, and records that the VM
// is the destination's, unless it recorded that before.
func commitTime(e entries) (float64, error) {
	downtime, err := e.switched.duration("downtime")
	save, saveErr := e.loaded.duration("save")
	transfer, transferErr := e.loaded.duration("transfer")
	network, networkErr := e.switched.duration("network")
	cont, contErr := e.switched.duration("cont")
	return downtime - save - transfer - network/2 - cont, errors.Join(err, saveErr, transferErr, networkErr, contErr)
}

// showSteps moves the VM of each case by migrated and prints how long the parts of the downtime took.
func showSteps(ctx context.Context, o options, chosen []benchCase) error {
	r := stepsReport{QEMU: o.qemu, Rounds: o.rounds}
	for i, c := range chosen {
		fmt.Printf("── case %d of %d: %s, %d moves, QEMU %s\n", i+1, len(chosen), c.name(), o.rounds, o.qemu)
		of, err := c.steps(ctx, o)
		if err != nil {
			return fmt.Errorf("case %s: %w", c.name(), err)
		}
		r.Cases = append(r.Cases, of)
		if err := jsonfile.Write(filepath.Join(o.dir, "steps.json"), r); err != nil {
			return err
		}
	}
	r.print(os.Stdout)
	return nil
}

// steps runs one case on a scene of its own.
func (c benchCase) steps(ctx context.Context, o options) (_ *caseSteps, err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	s, err := c.stage(ctx, o)
	if err != nil {
		return nil, err
	}
	defer func() { err = s.close(err) }()
	r := &caseSteps{Network: c.network.name, Guest: c.guest.name, Steps: map[string]*spread{}}
	for _, step := range steps {
		r.Steps[step.name] = &spread{}
	}
	for round := range o.rounds {
		from := s.at
		f, err := s.move(ctx, contenders[0])
		if err != nil {
			return nil, fmt.Errorf("move %d: %w", round+1, err)
		}
		fmt.Printf("   move %d: %v\n", round+1, f)
		e, err := s.entries(from, f)
		if err != nil {
			return nil, fmt.Errorf("move %d: %w", round+1, err)
		}
		for _, step := range steps {
			value, err := step.of(e)
			if err != nil {
				return nil, fmt.Errorf("move %d: %w", round+1, err)
			}
			r.Steps[step.name].All = append(r.Steps[step.name].All, value)
		}
	}
	for _, s := range r.Steps {
		s.finish()
	}
	return r, s.verify(ctx)
}

// entries returns what was logged about the newest move, which began at from.
func (s *scene) entries(from *lab.Host, f figures) (e entries, err error) {
	e.downtime = ms(f.Downtime)
	for _, of := range []struct {
		host    *lab.Host
		message string
		to      *entry
	}{
		{from, "the early state of the devices", &e.early},
		{from, "the device state is loaded", &e.loaded},
		{from, "switched over", &e.switched},
		{s.at, "the VM runs", &e.runs},
	} {
		if *of.to, err = findEntry(s.daemonLog(of.host), s.id(), of.message); err != nil {
			return e, err
		}
	}
	return e, nil
}

// print prints medians, with a column for each case.
func (r stepsReport) print(out io.Writer) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "QEMU %s, medians of %d", r.QEMU, r.Rounds)
	for _, c := range r.Cases {
		fmt.Fprintf(w, "\t%s/%s", c.Network, c.Guest)
	}
	fmt.Fprintln(w)
	for _, step := range steps {
		fmt.Fprint(w, measure{name: step.name, unit: step.unit}.label())
		for _, c := range r.Cases {
			fmt.Fprintf(w, "\t%.2f", c.Steps[step.name].Median)
		}
		fmt.Fprintln(w)
	}
	_ = w.Flush() // standard output; an error cannot be reported elsewhere
}
