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
	"time"

	"github.com/migrated-vm/migrated/e2e/jsonfile"
	"github.com/migrated-vm/migrated/e2e/lab"
)

// memoryKinds are two guests whose moves are compared. They differ in nothing but their memory.
var memoryKinds = []guestLoad{
	memoryGuest("shared", lab.BackendFile), memoryGuest("private", lab.BackendDefault),
}

// kindsReport compares moves by migrated of VMs that differ in one thing. Ratio is the median of each kind divided by
// that of the first.
type kindsReport struct {
	QEMU    string                        `json:"qemu"` // its version
	Network string                        `json:"network"`
	Rounds  int                           `json:"rounds"` // of all kinds
	Names   []string                      `json:"names"`
	Kinds   map[string]map[string]*spread `json:"kinds"`
	Ratio   map[string]map[string]float64 `json:"ratio"`
}

var kindMeasures = []measure{
	{name: "downtime", unit: "ms", of: func(f figures) float64 { return ms(f.Downtime) }},
	{name: "fault_p50", unit: "µs", of: func(f figures) float64 { return ms(f.FaultP50) * 1000 }},
	{name: "fault_p99", unit: "µs", of: func(f figures) float64 { return ms(f.FaultP99) * 1000 }},
	{name: "stall_p99", unit: "ms", of: func(f figures) float64 { return ms(f.StallP99) }},
	{name: "time_to_90", unit: "ms", of: func(f figures) float64 { return ms(f.TimeTo90) }},
	{name: "residency", unit: "ms", of: func(f figures) float64 { return ms(f.Residency) }},
	{name: "cpu", unit: "s", of: func(f figures) float64 { return f.CPU.Seconds() }},
}

// compareMemory moves VMs with shared and with private memory, and writes memory.json.
func compareMemory(ctx context.Context, o options) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	r, err := compareKinds(ctx, o, networks[0], memoryKinds, time.Now().Add(patience))
	if err != nil {
		return err
	}
	return jsonfile.Write(filepath.Join(o.dir, "memory.json"), r)
}

// compareKinds moves VMs by migrated, in turns, for as many rounds as there is time for, and at least one. Each VM is
// on a stage of its own, and stopped while another one is moved.
func compareKinds(
	ctx context.Context, o options, on network, kinds []guestLoad, until time.Time,
) (_ *kindsReport, err error) {
	r := newKindsReport(o.qemu, on, kinds)
	var scenes []*scene
	defer func() {
		for _, s := range scenes {
			err = s.close(err)
		}
	}()
	for _, guest := range kinds {
		own := o
		own.dir = filepath.Join(o.dir, guest.name)
		if err := os.MkdirAll(own.dir, 0o755); err != nil {
			return nil, err
		}
		s, err := benchCase{qemu: o.qemu, network: on, guest: guest, devices: true}.stage(ctx, own)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", guest.name, err)
		}
		scenes = append(scenes, s)
		if err := s.command(ctx, "stop"); err != nil {
			return nil, err
		}
	}
	for round := range o.rounds {
		if round > 0 && time.Now().After(until) {
			fmt.Printf("   no time for round %d\n", round+1)
			break
		}
		for i := range scenes {
			s := scenes[(i+round)%len(scenes)] // each begins as often
			f, err := s.moveAlone(ctx)
			if err != nil {
				return nil, fmt.Errorf("round %d, %s: %w", round+1, s.bench.guest.name, err)
			}
			r.add(s.bench.guest.name, f)
			fmt.Printf("   round %d, %-16s %v, faults p50 %v p99 %v\n",
				round+1, s.bench.guest.name, f, f.FaultP50, f.FaultP99)
		}
		r.Rounds++
	}
	r.finish()
	return r, r.print(os.Stdout)
}

// moveAlone lets the VM run, moves it by migrated, checks its memory and stops it.
func (s *scene) moveAlone(ctx context.Context) (f figures, err error) {
	if err := s.command(ctx, "cont"); err != nil {
		return f, err
	}
	if f, err = s.move(ctx, contenders[0]); err != nil {
		return f, err
	}
	return f, errors.Join(s.verify(ctx), s.command(ctx, "stop"))
}

// command runs a QMP command without arguments in the VM's QEMU.
func (s *scene) command(ctx context.Context, name string) error {
	client, err := s.at.QMP(ctx)
	if err != nil {
		return err
	}
	return errors.Join(client.Do(ctx, name, nil, nil), client.Disconnect())
}

func newKindsReport(qemu string, on network, kinds []guestLoad) *kindsReport {
	r := &kindsReport{
		QEMU: qemu, Network: on.name, Kinds: map[string]map[string]*spread{}, Ratio: map[string]map[string]float64{},
	}
	for _, kind := range kinds {
		r.Names = append(r.Names, kind.name)
		r.Kinds[kind.name] = map[string]*spread{}
		for _, m := range kindMeasures {
			r.Kinds[kind.name][m.name] = &spread{}
		}
	}
	return r
}

func (r *kindsReport) add(kind string, f figures) {
	for _, m := range kindMeasures {
		s := r.Kinds[kind][m.name]
		s.All = append(s.All, m.of(f))
	}
}

// finish computes medians and ratios.
func (r *kindsReport) finish() {
	for _, kind := range r.Names {
		r.Ratio[kind] = map[string]float64{}
		for _, m := range kindMeasures {
			r.Kinds[kind][m.name].finish()
			if first := r.Kinds[r.Names[0]][m.name].Median; first > 0 {
				r.Ratio[kind][m.name] = r.Kinds[kind][m.name].Median / first
			}
		}
	}
}

func (r *kindsReport) print(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "QEMU %s, %s", r.QEMU, r.Network)
	for i, kind := range r.Names {
		fmt.Fprintf(w, "\t%s", kind)
		if i > 0 {
			fmt.Fprintf(w, "\t/ %s", r.Names[0])
		}
	}
	fmt.Fprintln(w)
	for _, m := range kindMeasures {
		fmt.Fprint(w, m.label())
		for i, kind := range r.Names {
			fmt.Fprintf(w, "\t%v", r.Kinds[kind][m.name])
			if i > 0 {
				fmt.Fprintf(w, "\t%s", ratio(r.Ratio[kind], m))
			}
		}
		fmt.Fprintln(w)
	}
	return w.Flush()
}
