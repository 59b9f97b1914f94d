// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"net"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/e2e/guest/card"
)

func TestTally(t *testing.T) {
	start := time.Unix(1000, 0)
	at := func(ms int) time.Time { return start.Add(time.Duration(ms) * time.Millisecond) }
	var never time.Time
	sent := []time.Time{at(0), at(10), at(20), at(30), at(40)}
	gap := func(answered, lost, ms, began int) Pings {
		return Pings{
			Sent: len(sent), Answered: answered, Lost: lost,
			LongestGap: time.Duration(ms) * time.Millisecond, GapBegan: at(began),
		}
	}
	for name, c := range map[string]struct {
		answered []time.Time
		want     Pings
	}{
		"all":          {[]time.Time{at(1), at(11), at(21), at(31), at(41)}, gap(5, 0, 10, 1)},
		"late":         {[]time.Time{at(1), at(38), at(38), at(39), at(41)}, gap(5, 0, 37, 1)},
		"out of order": {[]time.Time{at(3), at(25), at(21), at(31), at(41)}, gap(5, 0, 18, 3)},
		"lost":         {[]time.Time{at(1), never, never, at(31), at(41)}, gap(3, 2, 30, 1)},
		"never back":   {[]time.Time{at(1), never, never, never, never}, gap(1, 4, 39, 1)},
		"none":         {[]time.Time{never, never, never, never, never}, gap(0, 5, 40, 0)},
	} {
		got := tally(sent, c.answered)
		if got.Sent != c.want.Sent || got.Answered != c.want.Answered || got.Lost != c.want.Lost ||
			got.LongestGap != c.want.LongestGap || !got.GapBegan.Equal(c.want.GapBegan) {
			t.Errorf("%s: %+v, want %+v", name, got, c.want)
		}
	}
}

func TestAnnounces(t *testing.T) {
	mac := card.MAC(0, 0)
	frame := func(source net.HardwareAddr, kind byte, target byte) []byte {
		b := make([]byte, 60)
		copy(b[frameSource:], source)
		b[frameType], b[frameType+1] = 0x08, kind
		if kind == 0x35 {
			b[frameType] = 0x80
		}
		copy(b[arpSenderIP:], []byte{10, 78, 0, 10})
		copy(b[arpTargetIP:], []byte{10, 78, 0, target})
		return b
	}
	for name, c := range map[string]struct {
		frame    []byte
		rarp, ok bool
	}{
		"QEMU's":         {frame(mac, 0x35, 10), true, true},
		"the guest's":    {frame(mac, 0x06, 10), false, true},
		"a question":     {frame(mac, 0x06, 1), false, false},
		"another card's": {frame(card.MAC(0, 1), 0x35, 10), false, false},
		"data":           {frame(mac, 0x00, 10), false, false},
		"too short":      {frame(mac, 0x35, 10)[:20], false, false},
	} {
		if rarp, ok := announces(c.frame, mac); rarp != c.rarp || ok != c.ok {
			t.Errorf("%s: %v, %v", name, rarp, ok)
		}
	}
}
