// SPDX-License-Identifier: Apache-2.0

package main

import (
	"testing"
	"time"

	"github.com/migrated-vm/migrated/e2e/lab"
)

func TestClient(t *testing.T) {
	stopped := time.Now()
	sw := lab.Switch{Stopped: stopped, Resumed: stopped.Add(40 * time.Millisecond)}
	at := func(ms int) lab.Announcement {
		return lab.Announcement{At: stopped.Add(time.Duration(ms) * time.Millisecond)}
	}
	var f figures
	heard := []lab.Announcement{at(-5), at(55), at(99)}
	f.ofClient(lab.Pings{Sent: 9, Lost: 2, LongestGap: time.Second, Announcements: heard}, sw, benchCase{})
	if f.Pings != 9 || f.PingsLost != 2 || f.PingGap != time.Second || f.Announced != 55*time.Millisecond {
		t.Errorf("the client has seen %+v", f)
	}
	f.ofClient(lab.Pings{Sent: 9, Announcements: []lab.Announcement{at(-5)}}, sw, benchCase{})
	if f.Announced <= time.Second {
		t.Errorf("a VM that is never announced is announced after %v", f.Announced)
	}
}

func TestMeasuresOfDevices(t *testing.T) {
	for name, want := range map[string]bool{"devices-8": false, "devices-8-busy": true, "random-private": false} {
		chosen, err := choose("full", "^loopback/"+name+"$")
		if err != nil || len(chosen) != 1 {
			t.Fatalf("%v, %v", names(chosen), err)
		}
		r := newCaseReport(chosen[0])
		for _, m := range []string{"pings_lost", "ping_gap", "announced"} {
			if _, has := r.Ours[m]; has != want {
				t.Errorf("%s has %s: %t", name, m, has)
			}
		}
	}
}
