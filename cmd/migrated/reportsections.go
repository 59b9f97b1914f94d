// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/migrated-vm/migrated/internal/migration"
	"github.com/migrated-vm/migrated/internal/report"
	"github.com/migrated-vm/migrated/internal/units"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// A section is a table of a report. Some rows may have a bar, and the section may have a curve. The text and the page
// show the same sections.
type section struct {
	Title   string
	Note    string // a sentence or two above the table; may be empty
	Columns []string
	Rows    []row
	// Bars describes the bars for those who do not see them; empty: there are none.
	Bars  string
	Scale string // what a bar of the whole width means: "12.0 ms"
	Curve *curve
}

// A row has a cell for each column. The first is its name. The bar belongs to the cell barCell.
type row struct {
	Cells []string
	Bar   *span
}

// span is the begin and the end of a bar, in shares of the whole width.
type span struct{ From, To float64 }

func cells(texts ...string) row { return row{Cells: texts} }

// barCell is the index of the column that bars belong to.
const barCell = 1

// A curve goes from left to right.
type curve struct {
	Title, Description string
	Points             []point // in shares of the figure's width and height
	Width, Height      string  // what the whole width and height mean: "12.0 s", "all pages"
}

type point struct{ X, Y float64 }

// reportSections returns the sections of a report that have rows.
func reportSections(r *migratedv1.Report) (sections []section) {
	all := []section{
		downtimeSection(r), stallSection(r), latencySection(r), percentileSection(r), causesSection(r),
		memorySection(r), rateSection(r),
		timelineSection("States, as this host saw them", r.GetTimeline()),
		timelineSection("States, as the destination saw them", r.GetDestinationTimeline()),
		versionsSection(r), checkSection(r.GetCheck()),
	}
	for _, s := range all {
		if len(s.Rows) > 0 {
			sections = append(sections, s)
		}
	}
	return sections
}

// shareOf returns a bar from 0 to part of whole; nil: whole is 0.
func shareOf(part, whole float64) *span {
	if whole <= 0 {
		return nil
	}
	return &span{0, min(1, part/whole)}
}

func downtimeSection(r *migratedv1.Report) section {
	all := r.GetMigration().GetProgress().GetDowntime()
	steps := r.GetDowntimeSteps()
	s := section{
		Title: "Downtime, step by step", Columns: []string{"step", "took", "what took the time"},
		Bars: "each step of the downtime, one after the other", Scale: durationText(all),
	}
	if all != nil {
		s.Note = fmt.Sprintf("The VM stood still for %s.", durationText(all))
	}
	from := 0.0
	for _, step := range report.Steps(steps) {
		if step.Took == nil {
			continue
		}
		to := from
		if all.AsDuration() > 0 {
			to += step.Took.AsDuration().Seconds() / all.AsDuration().Seconds()
		}
		one := cells(step.Name, durationText(step.Took), step.What)
		if steps.GetSaveTime() != nil { // without it the beginning of the other steps is unknown
			one.Bar = &span{min(1, from), min(1, to)}
		}
		s.Rows = append(s.Rows, one)
		from = to
	}
	for _, other := range []row{
		cells("loading", durationText(steps.GetLoadTime()), "QEMU loaded the state; it may begin before all is saved"),
		cells("stop", durationText(steps.GetStopTime()), "QEMU stopped the VM, which ran for most of it"),
	} {
		if other.Cells[1] != "-" {
			s.Rows = append(s.Rows, other)
		}
	}
	if len(s.Rows) == 0 || s.Rows[0].Bar == nil {
		s.Bars = ""
	}
	return s
}

func stallSection(r *migratedv1.Report) section {
	p, in, early := r.GetMigration().GetProgress(), r.GetIncoming(), r.GetMigration().GetEarlyLoad()
	s := section{
		Title: "How long the VM, or a thread of it, stood still", Columns: []string{"stall", "took", "why"},
		Bars: "how long each took",
	}
	stalls := []struct {
		name string
		took *durationpb.Duration
		why  string
	}{
		{"early load", early.GetPause(), "the whole VM, while it was prepared"},
		{"switch", p.GetDowntime(), "the whole VM, from its stop to its running at the destination"},
		{"longest fault", p.GetFaultMax(), "a thread that waited for a page"},
		{"early faults", in.GetEarlyFaultMax(), fmt.Sprintf("the longest of %s until QEMU said that the VM runs",
			plural(in.GetEarlyFaults(), "fault"))},
		{"lost lanes", in.GetLongestPause(), fmt.Sprintf("the longest time without memory, of %s in all; "+
			"the lanes were opened again %s", durationText(in.GetPaused()), plural(in.GetLaneReconnections(), "time"))},
	}
	var longest time.Duration
	for _, stall := range stalls {
		longest = max(longest, stall.took.AsDuration())
	}
	for _, stall := range stalls {
		if stall.took.AsDuration() > 0 {
			s.Rows = append(s.Rows, row{[]string{stall.name, durationText(stall.took), stall.why},
				shareOf(stall.took.AsDuration().Seconds(), longest.Seconds())})
		}
	}
	s.Scale = units.Duration(longest)
	return s
}

func latencySection(r *migratedv1.Report) section {
	latency := r.GetIncoming().GetLatency()
	columns := report.Columns(latency)
	s := section{
		Title: "How long faults took", Columns: []string{"at most", "faults", "share"},
		Bars: "how many faults took at most that long, but longer than the row above",
	}
	timed, most := report.Timed(latency), uint64(0)
	for _, c := range columns {
		most = max(most, c.Count)
	}
	for _, c := range columns {
		s.Rows = append(s.Rows, row{
			[]string{units.Duration(c.Longest), fmt.Sprint(c.Count), units.Percent(float64(c.Count), float64(timed))},
			shareOf(float64(c.Count), float64(most)),
		})
	}
	s.Note = fmt.Sprintf("%s timed, from a fault's message being read to its page being there. "+
		"Threads waited for %s in all.",
		plural(timed, "fault"), durationText(r.GetIncoming().GetLatencySum()))
	s.Scale = plural(most, "fault")
	return s
}

func percentileSection(r *migratedv1.Report) section {
	p, latency := r.GetMigration().GetProgress(), r.GetIncoming().GetLatency()
	s := section{Title: "Percentiles of these", Columns: []string{"share of the faults", "took at most"}}
	if report.Timed(latency) == 0 {
		if p.GetFaults() > 0 && p.GetFaultMax() != nil { // a source does not have the buckets yet
			s.Rows = []row{
				cells("50 %", durationText(p.GetFaultP50())), cells("99 %", durationText(p.GetFaultP99())),
				cells("all", durationText(p.GetFaultMax())),
			}
		}
		return s
	}
	for _, q := range []struct {
		name string
		of   float64
	}{{"50 %", 0.5}, {"90 %", 0.9}, {"99 %", 0.99}, {"99.9 %", 0.999}, {"all", 1}} {
		took := report.Percentile(latency, p.GetFaultMax().AsDuration(), q.of)
		s.Rows = append(s.Rows, cells(q.name, units.Duration(took)))
	}
	return s
}

func causesSection(r *migratedv1.Report) section {
	p, c := r.GetMigration().GetProgress(), r.GetIncoming().GetCauses()
	s := section{
		Title: "Faults by what was known of the page", Columns: []string{"page", "faults", "share", "meaning"},
		Bars: "the faults of each kind",
	}
	all := c.GetMissing() + c.GetSwept() + c.GetAhead() + c.GetWaiting() + c.GetZero() + c.GetPresent()
	if all == 0 {
		return s
	}
	for _, cause := range []struct {
		name    string
		n       uint64
		meaning string
	}{
		{"missing", c.GetMissing(), "nobody had asked for it"},
		{"swept", c.GetSwept(), "the sweep had asked for it; it was asked for once more"},
		{"ahead", c.GetAhead(), "it was prefetched because a thread's faults predicted it"},
		{"waiting", c.GetWaiting(), "another thread waited for it already"},
		{"zero", c.GetZero(), "it was known to be zero, and nothing crossed the network"},
		{"present", c.GetPresent(), "it was there"},
	} {
		s.Rows = append(s.Rows, row{
			[]string{cause.name, fmt.Sprint(cause.n), units.Percent(float64(cause.n), float64(all)), cause.meaning},
			shareOf(float64(cause.n), float64(all)),
		})
	}
	s.Note = fmt.Sprintf("%s. %s prefetched, and %.0f %% of the predictions were right.", plural(all, "fault"),
		plural(p.GetPagesGuessed(), "page"), 100*p.GetGuessHits())
	s.Scale = plural(all, "fault")
	return s
}

func memorySection(r *migratedv1.Report) section {
	p, in := r.GetMigration().GetProgress(), r.GetIncoming()
	s := section{
		Title: "Memory by kind", Columns: []string{"kind", "bytes", "pages", "meaning"},
		Bars: "the bytes of each kind, in parts of all memory", Scale: bytesText(p.GetBytesTotal()),
	}
	if p.GetPagesTotal() == 0 {
		return s
	}
	add := func(name string, bytes uint64, pages, meaning string) {
		bar := shareOf(float64(bytes), float64(p.GetBytesTotal()))
		s.Rows = append(s.Rows, row{[]string{name, bytesText(bytes), pages, meaning}, bar})
	}
	add("all", p.GetBytesTotal(), fmt.Sprint(p.GetPagesTotal()), "the VM's memory; "+percent(p)+" at the destination")
	s.Rows = append(s.Rows, cells("zero", "-", fmt.Sprint(p.GetPagesZero()), "pages of zeros; nothing of them is sent"))
	if in != nil {
		add("content", in.GetUnpackedBytes(), "", "what was sent, before it was packed")
	}
	meaning := "what was sent, as packed"
	if n := in.GetUnpackedBytes(); n > 0 {
		meaning += fmt.Sprintf(": to %s", units.Percent(float64(p.GetBytesOnWire()), float64(n)))
	}
	add("wire", p.GetBytesOnWire(), "", meaning)
	if in != nil {
		add("demand", in.GetDemandBytes(), fmt.Sprint(in.GetDemandPages()), "of this, what faults and prefetching took")
		add("sweep", in.GetSweepBytes(), fmt.Sprint(in.GetSweepPages()), sweepMeaning(in))
	}
	if n := p.GetBytesDiscarded(); n > 0 {
		add("discarded", n, "", "by the guest, not fetched")
	}
	if n := p.GetBytesDeviceState(); n > 0 { // only the source counts them
		add("devices", n, "", "state of the devices, sent while the VM stood still")
	}
	return s
}

func sweepMeaning(in *migratedv1.IncomingPages) string {
	text := "of this, what the sweep brought"
	if n := in.GetMostBulkLanes(); n > 1 {
		text += fmt.Sprintf(", over up to %d connections at once", n)
	}
	if n := in.GetBulkLanesLost(); n > 0 {
		text += fmt.Sprintf(", of which %d were lost while others went on", n)
	}
	return text
}

// mostSamples is the most rows of the table beside a curve.
const mostSamples = 8

func rateSection(r *migratedv1.Report) section {
	p, in := r.GetMigration().GetProgress(), r.GetIncoming()
	s := section{Title: "How the memory came", Columns: []string{"after", "there", "on the wire", "rate", "faults"}}
	samples := in.GetSamples()
	if len(samples) == 0 {
		return s
	}
	end := samples[len(samples)-1].GetSinceSwitch().AsDuration().Seconds()
	limit := "no bandwidth limit"
	if p.GetBandwidth() > 0 {
		limit = "a bandwidth limit of " + limitText(p.GetBandwidth())
	}
	s.Note = fmt.Sprintf("%s at the best, with %s.", rateText(in.GetBestBytesPerSecond()), limit)
	if took := p.GetResidency().AsDuration().Seconds(); took > 0 {
		s.Note = fmt.Sprintf("All of it was there after %s: %s on average, ", durationText(p.GetResidency()),
			rateText(float64(p.GetBytesOnWire())/took)) + s.Note
	}
	s.Curve = &curve{
		Title: "Memory at the destination", Description: "the share of the pages that were there, from the switch on",
		Width: units.Duration(time.Duration(end * float64(time.Second))), Height: "all pages",
	}
	before := &migratedv1.PageSample{}
	for i, sample := range samples {
		if end > 0 {
			s.Curve.Points = append(s.Curve.Points, point{sample.GetSinceSwitch().AsDuration().Seconds() / end,
				float64(sample.GetPagesPresent()) / float64(max(1, p.GetPagesTotal()))})
		}
		if i != len(samples)-1 && (i+1)*mostSamples/len(samples) == i*mostSamples/len(samples) {
			continue
		}
		rate := "-"
		took := sample.GetSinceSwitch().AsDuration() - before.GetSinceSwitch().AsDuration()
		if bytes := sample.GetBytesOnWire(); took > 0 {
			rate = rateText(float64(bytes-min(before.GetBytesOnWire(), bytes)) / took.Seconds())
		}
		s.Rows = append(s.Rows, cells(
			durationText(sample.GetSinceSwitch()),
			units.Percent(float64(sample.GetPagesPresent()), float64(p.GetPagesTotal())),
			bytesText(sample.GetBytesOnWire()), rate, fmt.Sprint(sample.GetFaults())))
		before = sample
	}
	if len(s.Curve.Points) < 2 {
		s.Curve = nil
	}
	return s
}

func timelineSection(title string, t *migratedv1.Timeline) section {
	s := section{
		Title: title, Columns: []string{"state", "lasted", "after", "reason", "at"},
		Bars: "how long each state lasted, one after the other",
	}
	changes := t.GetChanges()
	if len(changes) == 0 {
		return s
	}
	whole := changes[len(changes)-1].GetSinceStart().AsDuration()
	s.Scale = units.Duration(whole)
	for i, c := range changes {
		if i == int(t.GetLeftOutAfter()) && t.GetLeftOut() > 0 {
			s.Rows = append(s.Rows, cells("…", "", "", plural(uint64(t.GetLeftOut()), "change")+" left out", ""))
		}
		since := c.GetSinceStart().AsDuration()
		one := cells(migration.StateName(c.GetState()), "-", units.Duration(since), "-", timeText(c.GetTime()))
		if c.GetReason() != migratedv1.Reason_REASON_UNSPECIFIED {
			one.Cells[3] = reasonName(c.GetReason())
		}
		gap := i+1 == int(t.GetLeftOutAfter()) && t.GetLeftOut() > 0
		if i+1 < len(changes) && !gap {
			next := changes[i+1].GetSinceStart().AsDuration()
			one.Cells[barCell] = units.Duration(next - since)
			if whole > 0 {
				one.Bar = &span{since.Seconds() / whole.Seconds(), next.Seconds() / whole.Seconds()}
			}
		}
		s.Rows = append(s.Rows, one)
	}
	return s
}

func versionsSection(r *migratedv1.Report) section {
	s := section{Title: "Versions", Columns: []string{"host", "daemon", "QEMU", "kernel"}}
	for _, host := range []struct {
		name string
		v    *migratedv1.HostVersions
	}{{"source", r.GetSource()}, {"destination", r.GetDestination()}} {
		s.Rows = append(s.Rows,
			cells(host.name, orDash(host.v.GetDaemon()), orDash(host.v.GetQemu()), orDash(host.v.GetKernel())))
	}
	if r.GetProtocol() > 0 {
		s.Note = fmt.Sprintf("Both daemons kept to version %d of their protocol.", r.GetProtocol())
	}
	return s
}

func checkSection(c *migratedv1.EarlierCheck) section {
	s := section{Title: "Checked before", Columns: []string{"found", "host", "subject", "detail"}}
	if c == nil {
		return s
	}
	s.Note = fmt.Sprintf("\"migrated check\" was asked at %s.", timeText(c.GetTime()))
	for _, found := range c.GetResults() {
		detail := oneLine(found.GetDetail())
		if found.GetRemedy() != "" {
			detail += "; what to do: " + oneLine(found.GetRemedy())
		}
		s.Rows = append(s.Rows,
			cells(statusWords[found.GetStatus()], migration.RoleName(found.GetHost()), found.GetSubject(), detail))
	}
	if len(s.Rows) == 0 {
		s.Columns, s.Rows = []string{"found"}, []row{cells("no failure and no warning")}
	}
	return s
}
