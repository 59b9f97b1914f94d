// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"slices"
	"time"
)

// tally computes the result of pings. sent and answered are the times of each ping and its answer; answered is zero if
// there was none.
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
