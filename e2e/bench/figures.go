// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"time"

	"github.com/migrated-vm/migrated/e2e/guest/report"
)

// figures are what one move has shown.
type figures struct {
	Downtime  time.Duration // from the source's STOP event to the destination's RESUME event
	Residency time.Duration // from RESUME until the contender says that all memory is there
	Bytes     uint64        // sent by both hosts, with all headers
	CPU       time.Duration // of all but the vCPUs, from the start of the destination's QEMU to residency

	CPUDaemons time.Duration // of CPU, the part of migrated's daemons
	Took       time.Duration // the time in which CPU was counted
	Machine    machineUse    // in that time

	// Of the guest's operations that ended within benchCase.after after RESUME; not set for a guest that does none.
	StallP50, StallP99, StallP999, StallMax time.Duration
	TimeTo90                                time.Duration // see timeTo90
	Speed                                   []float64     // of each window from RESUME on, relative to the speed before

	// Of the client that pings the first network card, from before the move until benchCase.after after it.
	Pings, PingsLost int
	PingGap          time.Duration // the longest time without an answer
	Announced        time.Duration // from the source's STOP event to the first announcement of the card's new place

	// Of the wire from source to destination, if it has a rate: see ofWire.
	LinkUse, LinkSteady float64
	UsedWellAfter       time.Duration

	// What the contender itself tells. Faults is how many faults took [2^N, 2^(N+1)) µs; nil if it does not tell.
	FaultP50, FaultP99 time.Duration
	Faults             []uint64
	Steps              []stepTime // of the downtime

	tls bool // migrated's daemons that use TLS moved the VM
}

func (f figures) String() string {
	text := fmt.Sprintf("downtime %6.2f ms, resident after %v, %.1f MB, CPU %v, of it daemons %v",
		ms(f.Downtime), f.Residency.Round(time.Millisecond), float64(f.Bytes)/1e6, f.CPU, f.CPUDaemons)
	if f.StallMax > 0 {
		text += fmt.Sprintf(", stalls p50 %v p99 %v max %v, at 90 %% after %v", f.StallP50.Round(time.Microsecond),
			f.StallP99.Round(10*time.Microsecond), f.StallMax.Round(10*time.Microsecond), f.TimeTo90.Round(time.Millisecond))
	}
	if f.LinkUse > 0 {
		text += fmt.Sprintf(", of the link %.2f, steadily %.2f, well after %v",
			f.LinkUse, f.LinkSteady, f.UsedWellAfter.Round(useEvery))
	}
	if f.Pings > 0 {
		text += fmt.Sprintf(", %d of %d pings lost, none answered for %v, announced after %v",
			f.PingsLost, f.Pings, f.PingGap.Round(time.Millisecond), f.Announced.Round(time.Millisecond))
	}
	return text
}

func ms(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e6 }

// ofGuest fills in what the guest has said: lines are all of its lines. A guest that has said too little is an error,
// because a stall of zero would look good.
func (f *figures) ofGuest(lines []report.Line, began, resumed time.Time, c benchCase) error {
	if c.guest.idle {
		return nil
	}
	switched := uptimeAt(lines, resumed.Add(-f.Downtime))
	var early, late []report.Window
	for _, l := range lines {
		switch {
		case l.Window == nil:
		case uptime(*l.Window) > switched:
			late = append(late, *l.Window)
		case l.At.After(began.Add(-before)) && l.At.Before(began):
			early = append(early, *l.Window)
		}
	}
	if len(early) < leastReports || len(late) < leastReports {
		return fmt.Errorf("the guest has reported %d times before the move and %d times after it; is the machine too busy?",
			len(early), len(late))
	}
	base := speed(early[0], early[len(early)-1])
	all, longest := report.Histogram{}, int64(0)
	for i, w := range late {
		if i > 0 && uptime(late[i-1])-switched > c.after() { // a report covers the time since the one before
			break
		}
		all.Add(w.Latencies)
		longest = max(longest, w.MaxUS)
	}
	quantile := func(permille uint64) time.Duration { return time.Duration(all.Quantile(permille)) }
	f.StallP50, f.StallP99, f.StallP999 = quantile(500), quantile(990), quantile(999)
	f.StallMax = time.Duration(longest) * time.Microsecond
	f.TimeTo90 = timeTo90(late, switched, base)
	for i := range late[1:] {
		f.Speed = append(f.Speed, speed(late[i], late[i+1])/base)
	}
	return nil
}

// uptime returns when a report was made, by the guest's clock, which stands still while the VM does.
func uptime(w report.Window) time.Duration { return time.Duration(w.UptimeMS) * time.Millisecond }

// uptimeAt returns what the guest's clock showed at a moment when the VM ran or had just been stopped. It goes by the
// last report before that moment, because reports after a switch come late when the guest stalls as a whole.
func uptimeAt(lines []report.Line, moment time.Time) (at time.Duration) {
	for _, l := range lines {
		if l.Window != nil && !l.At.After(moment) {
			at = uptime(*l.Window) + moment.Sub(l.At)
		}
	}
	return at
}

// leastReports is how many reports it takes to say how fast the guest is.
const leastReports = 2

// speed returns the guest's operations a second between two of its reports.
func speed(a, b report.Window) float64 {
	return float64(b.TotalOps-a.TotalOps) / (float64(max(1, b.UptimeMS-a.UptimeMS)) / 1000)
}

// settled is for how long the guest must keep its speed before it counts as back to it.
const settled = 200 * time.Millisecond

// timeTo90 returns the time from the switch until the guest does 90 % of base operations a second and keeps that up for
// settled. switched is what its clock showed at the switch. For a guest that does not come back to its speed it is all
// the time for which the guest was watched.
func timeTo90(late []report.Window, switched time.Duration, base float64) time.Duration {
	at := func(i int) time.Duration { return uptime(late[i]) - switched }
	for i := range late {
		for j := i + 1; j < len(late); j++ {
			if at(j)-at(i) < settled {
				continue
			}
			if speed(late[i], late[j]) >= 0.9*base {
				return at(i)
			}
			break
		}
	}
	return at(len(late) - 1)
}
