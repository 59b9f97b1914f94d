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

	// Of the guest's operations that ended in the benchCase.after after RESUME; not set for one that does none.
	StallP50, StallP99, StallP999, StallMax time.Duration
	TimeTo90                                time.Duration // see timeTo90
	Speed                                   []float64     // of each window from RESUME on, in parts of the speed before

	// Of the client that pings the first network card, from before the move until benchCase.after after it.
	Pings, PingsLost int
	PingGap          time.Duration // the longest time without an answer
	Announced        time.Duration // from the source's STOP event to the first announcement of the card's new place
}

func (f figures) String() string {
	text := fmt.Sprintf("downtime %6.2f ms, resident after %v, %.1f MB, CPU %v, of it daemons %v",
		ms(f.Downtime), f.Residency.Round(time.Millisecond), float64(f.Bytes)/1e6, f.CPU, f.CPUDaemons)
	if f.StallMax > 0 {
		text += fmt.Sprintf(", stalls p50 %v p99 %v max %v, at 90 %% after %v", f.StallP50.Round(time.Microsecond),
			f.StallP99.Round(10*time.Microsecond), f.StallMax.Round(10*time.Microsecond), f.TimeTo90.Round(time.Millisecond))
	}
	if f.Pings > 0 {
		text += fmt.Sprintf(", %d of %d pings lost, none answered for %v, announced after %v",
			f.PingsLost, f.Pings, f.PingGap.Round(time.Millisecond), f.Announced.Round(time.Millisecond))
	}
	return text
}

func ms(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e6 }

// ofGuest fills in what the guest has said: lines are all of its lines.
func (f *figures) ofGuest(lines []report.Line, began, resumed time.Time, c benchCase) {
	if c.guest.idle {
		return
	}
	var early, late []report.Window
	for _, l := range lines {
		switch {
		case l.Window == nil:
		case l.At.After(resumed):
			late = append(late, *l.Window)
		case l.At.After(began.Add(-before)) && l.At.Before(began):
			early = append(early, *l.Window)
		}
	}
	if len(early) < 2 || len(late) < 2 {
		return
	}
	base := speed(early[0], early[len(early)-1])
	all, longest := report.Histogram{}, int64(0)
	for _, w := range late {
		if time.Duration(w.UptimeMS-late[0].UptimeMS)*time.Millisecond > c.after() {
			break
		}
		all.Add(w.Latencies)
		longest = max(longest, w.MaxUS)
	}
	quantile := func(permille uint64) time.Duration { return time.Duration(all.Quantile(permille)) }
	f.StallP50, f.StallP99, f.StallP999 = quantile(500), quantile(990), quantile(999)
	f.StallMax = time.Duration(longest) * time.Microsecond
	f.TimeTo90 = timeTo90(late, base)
	for i := range late[1:] {
		f.Speed = append(f.Speed, speed(late[i], late[i+1])/base)
	}
}

// speed is the guest's operations a second between two of its reports.
func speed(a, b report.Window) float64 {
	return float64(b.TotalOps-a.TotalOps) / (float64(max(1, b.UptimeMS-a.UptimeMS)) / 1000)
}

// settled is for how long the guest must have its speed again to have come back to it.
const settled = 200 * time.Millisecond

// timeTo90 is the time from the switch until the guest does 90 % of base operations a second, and goes on so for a
// while. It counts from the first report after the switch, which began before it or a window earlier at most. A
// guest that does not come back to its speed gets all the time it was watched.
func timeTo90(late []report.Window, base float64) time.Duration {
	at := func(i int) time.Duration { return time.Duration(late[i].UptimeMS-late[0].UptimeMS) * time.Millisecond }
	for i := range late {
		for j := i + 1; j < len(late); j++ {
			if at(j)-at(i) < settled {
				continue
			}
			if speed(late[i], late[j]) >= 0.9*base {
				return at(i) + window
			}
			break
		}
	}
	return at(len(late) - 1)
}
