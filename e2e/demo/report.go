// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"

	"github.com/migrated-vm/migrated/e2e/jsonfile"
)

// demoReport is report.json.
type demoReport struct {
	Completed        bool    `json:"completed"`
	DowntimeMS       float64 `json:"downtime_ms"` // source's STOP event to destination's RESUME event
	Faults           uint64  `json:"faults"`
	FaultP50US       float64 `json:"fault_p50_us"`
	FaultP99US       float64 `json:"fault_p99_us"`
	ResidencyMS      float64 `json:"residency_ms"`
	PagesTotal       uint64  `json:"pages_total"`
	PagesZero        uint64  `json:"pages_zero"`
	BytesOnWire      uint64  `json:"bytes_on_wire"`
	GuestCorruptions uint64  `json:"guest_corruptions"`
	GuestOpsAfter    uint64  `json:"guest_ops_after"`
	DiskBlocks       uint64  `json:"disk_blocks"`     // checked: all blocks that were ever written
	DiskBlocksBad    uint64  `json:"disk_blocks_bad"` // of these
	client

	// With --compare, downtime_ms and residency_ms are medians over the rounds, and the other figures are those of the
	// first round.
	DowntimesMS    []float64   `json:"downtimes_ms,omitempty"`
	QEMUDowntimeMS *float64    `json:"qemu_downtime_ms,omitempty"`
	QEMU           *qemuReport `json:"qemu,omitempty"`

	reported time.Duration // the downtime as migrated itself gave it
	worked   time.Duration
	guestErr error
}

// qemuReport is what QEMU's own post-copy did with the same VM.
type qemuReport struct {
	DowntimeMS       float64   `json:"downtime_ms"`
	DowntimesMS      []float64 `json:"downtimes_ms"`
	ResidencyMS      float64   `json:"residency_ms"`
	Bytes            uint64    `json:"bytes"`
	GuestCorruptions uint64    `json:"guest_corruptions"`
	client
}

func newReport(m *migratedv1.Migration, downtime time.Duration, v *verdict) *demoReport {
	p := m.GetProgress()
	return &demoReport{
		Completed:  m.GetState() == migratedv1.MigrationState_MIGRATION_STATE_COMPLETED,
		DowntimeMS: milliseconds(downtime), Faults: p.GetFaults(),
		FaultP50US: microseconds(p.GetFaultP50().AsDuration()), FaultP99US: microseconds(p.GetFaultP99().AsDuration()),
		ResidencyMS: milliseconds(p.GetResidency().AsDuration()),
		PagesTotal:  p.GetPagesTotal(), PagesZero: p.GetPagesZero(), BytesOnWire: p.GetBytesOnWire(),
		GuestCorruptions: v.corruptions, GuestOpsAfter: v.opsAfter,
		DiskBlocks: v.blocks, DiskBlocksBad: v.badBlocks,
		reported: p.GetDowntime().AsDuration(), worked: v.workedFor, guestErr: v.err,
	}
}

// verdict returns an error unless the demo showed a complete migration of a guest that works on undamaged.
func (r *demoReport) verdict() error {
	switch {
	case !r.Completed:
		return errors.New("the migration did not complete")
	case r.guestErr != nil:
		return r.guestErr
	case r.GuestOpsAfter == 0:
		return errors.New("the guest did nothing after the switch")
	default:
		return nil
	}
}

func (r *demoReport) write(path string) error {
	return jsonfile.Write(path, r)
}

func (r *demoReport) print(out io.Writer, path string) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	row := func(name, ours, theirs string) {
		if r.QEMU == nil {
			theirs = ""
		}
		fmt.Fprintf(w, "%s\t%s\t%s\n", name, ours, theirs)
	}
	q := r.QEMU
	if q == nil {
		q = &qemuReport{}
	}
	fmt.Fprintln(w)
	if r.QEMU != nil {
		row("", "migrated", "QEMU post-copy")
	}
	if r.QEMU == nil {
		row("downtime", fmt.Sprintf("%.2f ms (migrated itself says %.2f)", r.DowntimeMS, milliseconds(r.reported)), "")
	} else {
		row("downtime, median", fmt.Sprintf("%.2f ms", r.DowntimeMS), fmt.Sprintf("%.2f ms", q.DowntimeMS))
		row("of", fmt.Sprintf("%.2f", r.DowntimesMS), fmt.Sprintf("%.2f", q.DowntimesMS))
	}
	row("faults", fmt.Sprint(r.Faults), "")
	row("fault latency p50 / p99", fmt.Sprintf("%.0f / %.0f µs", r.FaultP50US, r.FaultP99US), "")
	row("time to full residency", fmt.Sprintf("%.0f ms", r.ResidencyMS), fmt.Sprintf("%.0f ms", q.ResidencyMS))
	row("pages, of them zero", fmt.Sprintf("%d, %d", r.PagesTotal, r.PagesZero), "")
	row("bytes on the wire",
		fmt.Sprintf("%.1f MB", float64(r.BytesOnWire)/1e6), fmt.Sprintf("%.1f MB", float64(q.Bytes)/1e6))
	row("guest's verdict",
		fmt.Sprintf("%d corruptions", r.GuestCorruptions), fmt.Sprintf("%d corruptions", q.GuestCorruptions))
	row("disk blocks checked, of them bad", fmt.Sprintf("%d, %d", r.DiskBlocks, r.DiskBlocksBad), "")
	row("pings, of them lost", r.pings(), q.pings())
	row("longest time without an answer", r.gap(), q.gap())
	row("first announcement", r.announced(), q.announced())
	row("guest's work after the switch", fmt.Sprintf("%d operations in %.1f s", r.GuestOpsAfter, r.worked.Seconds()), "")
	if r.QEMU != nil && r.QEMU.DowntimeMS > 0 {
		row("downtime, ours / QEMU's", fmt.Sprintf("%.2f", r.DowntimeMS/r.QEMU.DowntimeMS), "")
	}
	_ = w.Flush() // standard output; an error cannot be reported elsewhere
	fmt.Fprintf(out, "\nreport: %s\n", path)
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
func microseconds(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1000 }
