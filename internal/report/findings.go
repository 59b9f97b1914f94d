// SPDX-License-Identifier: Apache-2.0

package report

import (
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/migrated-vm/migrated/internal/units"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// rules are tried in this order. A rule returns an empty text if it does not apply, or if the report lacks what it
// needs. docs/report.md lists the rules.
var rules = []struct {
	name string
	find func(*migratedv1.Report) string
}{
	{"unexplained-pages", unexplainedPages},
	{"lost-pages", lostPages},
	{"overdue", overdue},
	{"downtime-step", downtimeStep},
	{"no-early-load", noEarlyLoad},
	{"longest-stall", longestStall},
	{"reconnects", reconnects},
	{"bandwidth-limit", bandwidthLimit},
	{"path-limit", pathLimit},
	{"path-idle", pathIdle},
	{"fault-causes", faultCauses},
	{"touched-pages", touchedPages},
	{"versions", versionsDiffer},
	{"taken-up", takenUp},
}

// Findings returns the texts of the rules that apply to a report.
func Findings(r *migratedv1.Report) (findings []*migratedv1.Finding) {
	for _, rule := range rules {
		if text := rule.find(r); text != "" {
			findings = append(findings, &migratedv1.Finding{Rule: rule.name, Text: text})
		}
	}
	return findings
}

func lostPages(r *migratedv1.Report) string {
	n := r.GetMigration().GetProgress().GetPagesLost()
	if n == 0 {
		return ""
	}
	return "the source could not read " + units.Plural(n, "page") + ": its memory is broken. " +
		"The VM gets a machine check where it touches one (docs/runbooks.md)."
}

func unexplainedPages(r *migratedv1.Report) string {
	n := r.GetMigration().GetProgress().GetPagesUnexplained()
	if n == 0 {
		return ""
	}
	return units.Plural(n, "page") + " were at the destination before they came, and could not be written again: " +
		"the VM may read zeros there. Do not trust what it writes (docs/runbooks.md)."
}

func overdue(r *migratedv1.Report) string {
	m := r.GetMigration()
	if !m.GetOverdue() {
		return ""
	}
	text := "Its memory was not all at the destination within its total_limit of " +
		units.Duration(m.GetSpec().GetTotalLimit().AsDuration())
	if m.GetStartTime() != nil && m.GetEndTime() != nil {
		text += "; it took " + units.Duration(m.GetEndTime().AsTime().Sub(m.GetStartTime().AsTime())) + " from its start"
	}
	return text + "."
}

// A Step is a part of the downtime.
type Step struct {
	Name string
	Took *durationpb.Duration // nil: unknown
	What string               // what happens in it
}

// Steps returns the steps of the downtime, in their order.
func Steps(s *migratedv1.DowntimeSteps) []Step {
	return []Step{
		{"save", s.GetSaveTime(), "the source's QEMU wrote down the state of its devices"},
		{"transfer", s.GetTransferTime(), "that state crossed, and the destination's QEMU loaded it"},
		{"commit", s.GetCommitTime(), "the source heard of the stop, checked what was saved and committed"},
		{"crossing", s.GetCrossingTime(), "the command to run the VM crossed the network"},
		{"continue", s.GetContinueTime(), "the destination's QEMU took the disks and ran the VM"},
	}
}

// longStep is the share of the downtime from which on a step counts as most of it.
const longStep = 0.5

func downtimeStep(r *migratedv1.Report) string {
	all := r.GetMigration().GetProgress().GetDowntime().AsDuration()
	var longest Step
	for _, s := range Steps(r.GetDowntimeSteps()) {
		if s.Took == nil {
			return "" // this is a destination's report, which has only the last steps
		}
		if longest.Took == nil || s.Took.AsDuration() > longest.Took.AsDuration() {
			longest = s
		}
	}
	took := longest.Took.AsDuration()
	if all <= 0 || took <= 0 {
		return ""
	}
	share := "its longest step"
	if float64(took) >= longStep*float64(all) {
		share = "most of it"
	}
	text := fmt.Sprintf("The VM stood still for %s at the switch; %s, %s or %s, was %q: %s.",
		units.Duration(all), share, units.Duration(took), units.Percent(float64(took), float64(all)),
		longest.Name, longest.What)
	if load := r.GetDowntimeSteps().GetLoadTime().AsDuration(); longest.Name == "transfer" && load > 0 {
		text += fmt.Sprintf(" Loading took %s of %s of state.", units.Duration(load),
			units.Bytes(r.GetMigration().GetProgress().GetBytesDeviceState()))
	}
	return text
}

func noEarlyLoad(r *migratedv1.Report) string {
	m := r.GetMigration()
	downtime, early := m.GetProgress().GetDowntime(), m.GetEarlyLoad()
	if early == nil || early.GetLoaded() || downtime == nil {
		return ""
	}
	return fmt.Sprintf("All of the devices' state, %s, was loaded while the VM stood still, for %s, "+
		"because none of it was loaded before: %s.",
		units.Bytes(m.GetProgress().GetBytesDeviceState()), units.Duration(downtime.AsDuration()), early.GetReason())
}

// tail is how many times longer than the 99th percentile the longest fault is if it counts as an exception.
const tail = 10

// longestStall describes the longest stall: of the whole VM, or of a thread that waited for a page.
func longestStall(r *migratedv1.Report) string {
	p, in := r.GetMigration().GetProgress(), r.GetIncoming()
	downtime, early := p.GetDowntime().AsDuration(), r.GetMigration().GetEarlyLoad().GetPause().AsDuration()
	fault, pause := p.GetFaultMax().AsDuration(), in.GetLongestPause().AsDuration()
	switch longest := max(downtime, early, fault, pause); {
	case longest == 0:
		return ""
	case pause > 0 && longest == pause, longest == fault && pause > 0 && fault < pause*5/4:
		return fmt.Sprintf("The longest stall was that of a lost connection: "+
			"no memory came for %s, and the longest fault took %s.",
			units.Duration(pause), units.Duration(fault))
	case longest == downtime:
		return fmt.Sprintf("The longest stall was the switch itself: %s; the longest fault took %s.",
			units.Duration(downtime), units.Duration(fault))
	case longest == early:
		return fmt.Sprintf("The longest stall was the pause of the early load, while the VM was prepared: %s; "+
			"the switch took %s.",
			units.Duration(early), units.Duration(downtime))
	case in.GetEarlyFaultMax() != nil && fault <= in.GetEarlyFaultMax().AsDuration():
		return fmt.Sprintf("The longest stall was a fault of %s, before QEMU said that the VM runs: "+
			"loading its devices, or its first instruction, waited for that page; the switch took %s.",
			units.Duration(fault), units.Duration(downtime))
	}
	p99 := p.GetFaultP99().AsDuration()
	text := fmt.Sprintf("The longest stall was a fault of %s; 99 %% took at most %s, and the switch took %s.",
		units.Duration(fault), units.Duration(p99), units.Duration(downtime))
	if fault >= tail*p99 {
		text += " Only a few faults took so long: perhaps a packet was lost, or a host was busy."
	}
	return text
}

func reconnects(r *migratedv1.Report) string {
	in := r.GetIncoming()
	if in.GetLaneReconnections() == 0 || in.GetPaused().AsDuration() == 0 {
		return ""
	}
	return fmt.Sprintf("The connection to the source's memory was made again %s; "+
		"no memory came for %s in all, for %s at the longest.",
		units.Plural(in.GetLaneReconnections(), "time"), units.Duration(in.GetPaused().AsDuration()),
		units.Duration(in.GetLongestPause().AsDuration()))
}

// nearlyAll and little are shares of the highest rate, or of a limit: from nearlyAll on the rate has reached it, and
// below little it is far from it.
const (
	nearlyAll = 0.8
	little    = 0.5
)

// tooShort is the shortest transfer whose rate means anything.
const tooShort = time.Second

// transferTime returns how long the transfer of the memory took, without pauses. ok is false if it was too short for a
// rate.
func transferTime(r *migratedv1.Report) (took time.Duration, ok bool) {
	p := r.GetMigration().GetProgress()
	took = p.GetResidency().AsDuration() - r.GetIncoming().GetPaused().AsDuration()
	return took, p.GetResidency() != nil && !r.GetIncoming().GetTakenUp() && took >= tooShort
}

func bandwidthLimit(r *migratedv1.Report) string {
	took, ok := transferTime(r)
	limit := float64(r.GetMigration().GetProgress().GetBandwidth())
	rate := float64(r.GetIncoming().GetSweepBytes()) / took.Seconds()
	if !ok || limit == 0 || rate < nearlyAll*limit {
		return ""
	}
	return fmt.Sprintf("The bandwidth limit was the bottleneck: "+
		"pages that no thread waited for came at %s, of %s allowed, for %s.",
		units.Rate(rate), units.Rate(limit), units.Duration(took))
}

// pathRates returns how long the memory took, and its average and best rate in bytes a second. ok is false if they say
// nothing about the path, because the transfer was too short, or a bandwidth limit was the limit.
func pathRates(r *migratedv1.Report) (took time.Duration, rate, best float64, ok bool) {
	took, ok = transferTime(r)
	rate = float64(r.GetMigration().GetProgress().GetBytesOnWire()) / took.Seconds()
	best = r.GetIncoming().GetBestBytesPerSecond()
	return took, rate, best, ok && best > 0 && bandwidthLimit(r) == ""
}

func pathLimit(r *migratedv1.Report) string {
	took, rate, best, ok := pathRates(r)
	if !ok || rate < nearlyAll*best {
		return ""
	}
	return fmt.Sprintf("The path between the hosts was the bottleneck: its link, or the CPU of a host. "+
		"Memory came at %s for %s, and at %s at the best.",
		units.Rate(rate), units.Duration(took), units.Rate(best))
}

func pathIdle(r *migratedv1.Report) string {
	took, rate, best, ok := pathRates(r)
	if !ok || rate >= little*best {
		return ""
	}
	return fmt.Sprintf("The path between the hosts was not the limit all the time: "+
		"memory came at %s on average for %s, and at %s at the best.",
		units.Rate(rate), units.Duration(took), units.Rate(best))
}

// someFaults is the lowest number of faults whose causes mean anything.
const someFaults = 100

func faultCauses(r *migratedv1.Report) string {
	p, c := r.GetMigration().GetProgress(), r.GetIncoming().GetCauses()
	all, asked := p.GetFaults(), c.GetMissing()+c.GetSwept()
	if all < someFaults || float64(asked) < longStep*float64(all) {
		return ""
	}
	return fmt.Sprintf("%s of %d faults met a page that had to be asked for then. "+
		"%s had been prefetched, and %.0f %% of the predictions were right: "+
		"the guest touches its memory in an order that is hard to predict, or is faster than the path.",
		units.Percent(float64(asked), float64(all)), all,
		units.Plural(p.GetPagesGuessed(), "page"), 100*p.GetGuessHits())
}

func touchedPages(r *migratedv1.Report) string {
	n := r.GetMigration().GetProgress().GetPagesTouched()
	if n == 0 {
		return ""
	}
	return units.Plural(n, "page") + " had been touched by another process of the destination before they came. " +
		"They were written again: the VM's memory is correct."
}

func versionsDiffer(r *migratedv1.Report) string {
	a, b := r.GetSource(), r.GetDestination()
	for _, v := range []struct{ what, a, b string }{
		{"daemon", a.GetDaemon(), b.GetDaemon()}, {"QEMU", a.GetQemu(), b.GetQemu()},
	} {
		if v.a != "" && v.b != "" && v.a != v.b {
			return fmt.Sprintf("The hosts have different versions: %s %s at the source, %s at the destination.",
				v.what, v.a, v.b)
		}
	}
	return ""
}

func takenUp(r *migratedv1.Report) string {
	if !r.GetTakenUp() && !r.GetIncoming().GetTakenUp() {
		return ""
	}
	return "A daemon was restarted in the middle of this migration: " +
		"the counts and the states are of its last run alone."
}
