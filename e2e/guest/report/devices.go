// SPDX-License-Identifier: Apache-2.0

package report

import (
	"errors"
	"fmt"
)

// ErrDisk is what Err returns, with details, for a guest whose disks failed, or do not hold what it wrote.
var ErrDisk = errors.New("guest disk is damaged")

// Disks returns the newest counters of each disk.
func (l *Log) Disks() []Disk {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]Disk(nil), l.disks...)
}

// Cards returns the newest counters of each network card.
func (l *Log) Cards() []Card {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]Card(nil), l.cards...)
}

// addDevices takes over the counters of disks and cards from a line. The caller holds l.mu.
func (l *Log) addDevices(line Line) {
	switch {
	case line.Window != nil:
		l.addDisks(line.Window.Disks)
		l.cards = line.Window.Cards
	case line.Verified != nil:
		l.addDisks(line.Verified.Disks)
		l.cards = line.Verified.Cards
	}
}

// addDisks takes over the counters of disks, and notes counters that ran backwards. The caller holds l.mu.
func (l *Log) addDisks(disks []Disk) {
	for i, d := range disks {
		if i >= len(l.disks) {
			continue
		}
		b := l.disks[i]
		if d.Reads < b.Reads || d.Writes < b.Writes || d.Flushes < b.Flushes ||
			d.Errors < b.Errors || d.Corruptions < b.Corruptions {
			l.back = append(l.back, fmt.Sprintf("%+v after %+v", d, b))
		}
	}
	l.disks = disks
}

// disksErr returns ErrDisk, with details, if a disk failed or is damaged. The caller holds l.mu.
func (l *Log) disksErr() error {
	for _, d := range l.disks {
		if d.Errors+d.Corruptions == 0 {
			continue
		}
		first := "no details were reported"
		for _, line := range l.lines {
			if c := line.Corruption; c != nil && c.Disk == d.Name {
				first = fmt.Sprintf("first: block %d, word %d is %s, not %s (%s)", c.Page, c.Word, c.Got, c.Expected, c.Kind)
				break
			}
		}
		return fmt.Errorf("%w: %s: %d errors, %d corruptions; %s", ErrDisk, d.Name, d.Errors, d.Corruptions, first)
	}
	return nil
}
