// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"

	"github.com/migrated-vm/migrated/e2e/lab"
)

// client is what a client that pings the VM's network card has seen of a move.
type client struct {
	PingsSent int     `json:"pings_sent"`
	PingsLost int     `json:"pings_lost"`
	PingGapMS float64 `json:"ping_gap_ms"` // the longest without an answer
	// AnnouncedMS is the time from the source's STOP event until the client had the card's first announcement; nil: there
	// was none.
	AnnouncedMS *float64 `json:"announced_ms"`
}

func newClient(p lab.Pings, s lab.Switch) client {
	c := client{PingsSent: p.Sent, PingsLost: p.Lost, PingGapMS: milliseconds(p.LongestGap)}
	if a, ok := p.FirstAnnouncement(s.Stopped); ok {
		after := milliseconds(a.At.Sub(s.Stopped))
		c.AnnouncedMS = &after
	}
	return c
}

func (c client) pings() string { return fmt.Sprintf("%d, %d", c.PingsSent, c.PingsLost) }
func (c client) gap() string   { return fmt.Sprintf("%.0f ms", c.PingGapMS) }

// announced returns when the VM's new place was known.
func (c client) announced() string {
	if c.AnnouncedMS == nil {
		return "never"
	}
	return fmt.Sprintf("%.2f ms after the VM stopped", *c.AnnouncedMS)
}
