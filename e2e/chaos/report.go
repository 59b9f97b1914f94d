// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/migrated-vm/migrated/e2e/jsonfile"
)

// chaosReport is report.json.
type chaosReport struct {
	Seed    uint64                 `json:"seed"`
	Libvirt bool                   `json:"libvirt"` // the VMs are domains of libvirt's
	Kinds   map[string]*kindReport `json:"kinds"`
	Cases   []result               `json:"cases"`
}

// A kindReport is how the faults of one kind ended.
type kindReport struct {
	Cases    int            `json:"cases"`
	Struck   int            `json:"struck"` // faults: cases whose moment came before their end
	Ends     map[string]int `json:"ends"`   // of these
	Obeyed   int            `json:"obeyed"` // of these, where an operator had to do something
	StallP50 float64        `json:"stall_p50_ms"`
	StallMax float64        `json:"stall_max_ms"`
	Failures int            `json:"failures"` // of all cases

	stalls []float64 // ms
}

func newReport(seed uint64, libvirt bool) *chaosReport {
	return &chaosReport{Seed: seed, Libvirt: libvirt, Kinds: map[string]*kindReport{}}
}

func (r *chaosReport) add(res result) {
	r.Cases = append(r.Cases, res)
	k := r.Kinds[res.Kind]
	if k == nil {
		k = &kindReport{Ends: map[string]int{}}
		r.Kinds[res.Kind] = k
	}
	k.Cases++
	if res.Failure != "" {
		k.Failures++
	}
	if !res.Struck {
		return
	}
	k.Struck++
	k.Ends[res.End]++
	if len(res.Notes) > 0 {
		k.Obeyed++
	}
	k.stalls = append(k.stalls, ms(res.Stall))
	slices.Sort(k.stalls)
	k.StallP50, k.StallMax = k.stalls[(len(k.stalls)-1)/2], k.stalls[len(k.stalls)-1]
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// failed returns the indices of cases that failed.
func (r *chaosReport) failed() (indices []int) {
	for _, res := range r.Cases {
		if res.Failure != "" {
			indices = append(indices, res.Index)
		}
	}
	return indices
}

// summary returns the last line of the output.
func (r *chaosReport) summary() string {
	faults, corruptions, blocks, lost, twice, orphaned, wrong := 0, uint64(0), uint64(0), 0, 0, 0, 0
	for _, res := range r.Cases {
		corruptions += res.Corruptions
		blocks += res.DiskCorruptions
		orphaned += count(res.Orphaned)
		faults += count(res.Struck)
		lost += count(res.Lost)
		twice += count(res.Twice)
		wrong += count(res.VirshWrong)
	}
	text := fmt.Sprintf("chaos: %d faults, %d corruptions of memory, %d of disks, %d VMs lost, %d times two copies ran; "+
		"%d VMs lost because their source QEMU was killed", faults, corruptions, blocks, lost, twice, orphaned)
	if r.Libvirt {
		text += fmt.Sprintf("; libvirt: %d times virsh was wrong", wrong)
	}
	return fmt.Sprintf("%s (seed %d)", text, r.Seed)
}

func count(b bool) int {
	if b {
		return 1
	}
	return 0
}

func (r *chaosReport) print(out io.Writer) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "fault\tcases\tstruck\tends\toperator\tstall p50, ms\tmax, ms\tfailed")
	for _, name := range slices.Sorted(maps.Keys(r.Kinds)) {
		k := r.Kinds[name]
		var ends []string
		for _, end := range slices.Sorted(maps.Keys(k.Ends)) {
			ends = append(ends, fmt.Sprintf("%d %s", k.Ends[end], end))
		}
		fmt.Fprintf(w, "%s\t%d\t%d\t%s\t%d\t%.0f\t%.0f\t%d\n",
			name, k.Cases, k.Struck, strings.Join(ends, ", "), k.Obeyed, k.StallP50, k.StallMax, k.Failures)
	}
	_ = w.Flush() // standard output; an error cannot be reported elsewhere
}

func (r *chaosReport) write(dir string) error {
	return jsonfile.Write(filepath.Join(dir, "report.json"), r)
}
