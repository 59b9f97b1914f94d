// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"slices"
	"time"
)

// tally counts pings: when each was sent, and when its answer came, if it did.
func tally(sent, answered []time.Time) Pings {
	p := Pings{Sent: len(sent)}
	if len(sent) == 0 {
		return p
	}
	var arrivals []time.Time
	for _, at := range answered {
		if !at.IsZero() {
			arrivals = append(arrivals, at)
		}
	}
	p.Answered = len(arrivals)
	p.Lost = p.Sent - p.Answered
	slices.SortFunc(arrivals, time.Time.Compare)
	p.Answers = arrivals
	last := sent[0]
	end := func(at time.Time) {
		if gap := at.Sub(last); gap > p.LongestGap {
			p.LongestGap, p.GapBegan = gap, last
		}
		last = at
	}
	for _, at := range arrivals {
		end(at)
	}
	end(sent[len(sent)-1])
	return p
}
