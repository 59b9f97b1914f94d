// SPDX-License-Identifier: Apache-2.0

package main

import (
	"time"

	"github.com/migrated-vm/migrated/e2e/lab"
)

// pingEvery is how often the VM's first network card is pinged, so how exactly its absence is seen.
const pingEvery = 10 * time.Millisecond

// ping begins to ping the VM's first network card; nil where the guest has none that is on.
func (s *scene) ping() (*lab.Pinger, error) {
	if !s.bench.guest.pinged {
		return nil, nil //nolint:nilnil // there is nobody to ping, which is no error
	}
	return s.lab.Ping(s.vm, 0, pingEvery)
}

// ofClient fills in what the client of a VM with network cards has seen. A VM that was not announced gets all the time
// that it was watched.
func (f *figures) ofClient(p lab.Pings, sw lab.Switch, c benchCase) {
	f.Pings, f.PingsLost, f.PingGap = p.Sent, p.Lost, p.LongestGap
	f.Announced = sw.Downtime() + c.after()
	if a, ok := p.FirstAnnouncement(sw.Stopped); ok {
		f.Announced = a.At.Sub(sw.Stopped)
	}
}
