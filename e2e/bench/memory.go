// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"text/tabwriter"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/migrated-vm/migrated/e2e/lab"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// memoryKinds are the two guests whose moves are compared. They differ in nothing but their memory.
var memoryKinds = []guestLoad{
	memoryGuest("shared", lab.BackendFile), memoryGuest("private", lab.BackendDefault),
}

// memoryReport is memory.json. Ratio is private / shared, of the medians.
type memoryReport struct {
	QEMU    string             `json:"qemu"` // its version
	Rounds  int                `json:"rounds"`
	Shared  map[string]*spread `json:"shared"`
	Private map[string]*spread `json:"private"`
	Ratio   map[string]float64 `json:"ratio"`
}

// A memoryMove is what one move by migrated has shown.
type memoryMove struct {
	figures
	faultP50, faultP99 time.Duration // as migrated itself counts them
}

var memoryMeasures = []struct {
	measure
	of func(memoryMove) float64
}{
	{measure{name: "downtime", unit: "ms"}, func(m memoryMove) float64 { return ms(m.Downtime) }},
	{measure{name: "fault_p50", unit: "µs"}, func(m memoryMove) float64 { return ms(m.faultP50) * 1000 }},
	{measure{name: "fault_p99", unit: "µs"}, func(m memoryMove) float64 { return ms(m.faultP99) * 1000 }},
	{measure{name: "stall_p99", unit: "ms"}, func(m memoryMove) float64 { return ms(m.StallP99) }},
	{measure{name: "time_to_90", unit: "ms"}, func(m memoryMove) float64 { return ms(m.TimeTo90) }},
	{measure{name: "residency", unit: "ms"}, func(m memoryMove) float64 { return ms(m.Residency) }},
	{measure{name: "cpu", unit: "s"}, func(m memoryMove) float64 { return m.CPU.Seconds() }},
}

// compareMemory moves two VMs by migrated, in turns. Each is on a stage of its own, and stopped while the other one is
// moved.
func compareMemory(ctx context.Context, o options) (err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	r := memoryReport{QEMU: o.qemu, Rounds: o.rounds, Ratio: map[string]float64{}}
	var scenes []*scene
	defer func() {
		for _, s := range scenes {
			err = s.close(err)
		}
	}()
	for _, guest := range memoryKinds {
		own := o
		own.dir = filepath.Join(o.dir, guest.name)
		if err := os.MkdirAll(own.dir, 0o755); err != nil {
			return err
		}
		s, err := benchCase{network: networks[0], guest: guest}.stage(ctx, own)
		if err != nil {
			return fmt.Errorf("%s memory: %w", guest.name, err)
		}
		scenes = append(scenes, s)
		if err := s.command(ctx, "stop"); err != nil {
			return err
		}
	}
	for round := range o.rounds {
		for i := range scenes {
			s := scenes[(i+round)%len(scenes)] // each begins as often
			m, err := s.moveAlone(ctx)
			if err != nil {
				return fmt.Errorf("round %d, %s memory: %w", round+1, s.bench.guest.name, err)
			}
			r.add(s.bench.guest.name, m)
			fmt.Printf("   round %d, %-8s %v, faults p50 %v p99 %v\n",
				round+1, s.bench.guest.name, m.figures, m.faultP50, m.faultP99)
		}
	}
	r.finish()
	r.print(os.Stdout)
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(o.dir, "memory.json"), append(data, '\n'), 0o644)
}

// moveAlone has the VM run, moves it by migrated, checks its memory and stops it.
func (s *scene) moveAlone(ctx context.Context) (m memoryMove, err error) {
	if err := s.command(ctx, "cont"); err != nil {
		return m, err
	}
	from := s.at
	if m.figures, err = s.move(ctx, contenders[0]); err != nil {
		return m, err
	}
	progress, err := s.progress(ctx, from)
	if err != nil {
		return m, err
	}
	m.faultP50, m.faultP99 = progress.GetFaultP50().AsDuration(), progress.GetFaultP99().AsDuration()
	return m, errors.Join(s.verify(ctx), s.command(ctx, "stop"))
}

// command gives the VM's QEMU a command that has no arguments.
func (s *scene) command(ctx context.Context, name string) error {
	client, err := s.at.QMP(ctx)
	if err != nil {
		return err
	}
	return errors.Join(client.Do(ctx, name, nil, nil), client.Disconnect())
}

// progress is what migrated says of the newest move, which began at from.
func (s *scene) progress(ctx context.Context, from *lab.Host) (*migratedv1.Progress, error) {
	binary, err := lab.Binary()
	if err != nil {
		return nil, err
	}
	out, err := from.Run(ctx, binary, "status", s.id(), "--json")
	if err != nil {
		return nil, err
	}
	var m migratedv1.Migration
	if err := protojson.Unmarshal([]byte(out), &m); err != nil {
		return nil, fmt.Errorf("answer of migrated status: %w", err)
	}
	return m.GetProgress(), nil
}

func (r *memoryReport) add(guest string, m memoryMove) {
	to := &r.Shared
	if guest != memoryKinds[0].name {
		to = &r.Private
	}
	if *to == nil {
		*to = map[string]*spread{}
	}
	for _, measure := range memoryMeasures {
		s := (*to)[measure.name]
		if s == nil {
			s = &spread{}
			(*to)[measure.name] = s
		}
		s.All = append(s.All, measure.of(m))
	}
}

// finish computes medians and ratios.
func (r *memoryReport) finish() {
	for _, m := range memoryMeasures {
		r.Shared[m.name].finish()
		r.Private[m.name].finish()
		if shared := r.Shared[m.name].Median; shared > 0 {
			r.Ratio[m.name] = r.Private[m.name].Median / shared
		}
	}
}

func (r *memoryReport) print(out io.Writer) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "QEMU %s\tshared\tprivate\tprivate / shared\n", r.QEMU)
	for _, m := range memoryMeasures {
		fmt.Fprintf(w, "%s\t%v\t%v\t%s\n", m.label(), r.Shared[m.name], r.Private[m.name], ratio(r.Ratio, m.measure))
	}
	_ = w.Flush() // standard output; there is nobody else to tell
}
