// SPDX-License-Identifier: Apache-2.0

package main

import (
	"time"

	"github.com/migrated-vm/migrated/e2e/lab"
)

// pingEvery is how often the VM's first network card is pinged, and so the precision of its absence.
const pingEvery = 10 * time.Millisecond

// lastAnswers is how long a move waits for the answers to its last pings. These go to a running VM. Pings that the move
// has lost get no answer.
const lastAnswers = time.Second

// ping begins to ping the VM's first network card. It returns nil if the guest has no card that is on.
func (s *scene) ping() (*lab.Pinger, error) {
	if !s.bench.guest.pinged {
		return nil, nil //nolint:nilnil // there is no card to ping, which is no error
	}
	return s.lab.Ping(s.vm, 0, pingEvery)
}

// ofClient fills in what the client of a VM with network cards has seen. If the VM was not announced, Announced is all
// the time for which it was watched.
func (f *figures) ofClient(p lab.Pings, sw lab.Switch, c benchCase) {
	f.Pings, f.PingsLost, f.PingGap = p.Sent, p.Lost, p.LongestGap
	f.Announced = sw.Downtime() + c.after()
	if a, ok := p.FirstAnnouncement(sw.Stopped); ok {
		f.Announced = a.At.Sub(sw.Stopped)
	}
}
