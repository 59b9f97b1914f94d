// SPDX-License-Identifier: Apache-2.0

package report

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

// Log collects what one guest says on all its serial ports: the source's before a migration, the destination's after
// it. It is safe for concurrent use. The zero value is an empty log.
type Log struct {
	mu      sync.Mutex
	changed chan struct{} // closed and replaced on each change
	lines   []Line
	garbled []string
	last    Counters
	disks   []Disk
	cards   []Card
	back    []string
}

// Follow reads lines from r into the log until r ends, and returns any error but io.EOF. Empty lines are left out. A
// line that does not parse is kept apart (see Garbled), because a connection may begin or end in the middle of a line.
func (l *Log) Follow(r io.Reader) error {
	b := bufio.NewReader(r)
	for {
		text, err := b.ReadBytes('\n')
		if err != nil {
			if len(text) > 0 {
				l.garble(string(text))
			}
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		if len(bytes.TrimSpace(text)) == 0 {
			continue
		}
		if line, err := Parse(text); err != nil {
			l.garble(err.Error())
		} else {
			line.At = time.Now()
			l.add(line)
		}
	}
}

func (l *Log) add(line Line) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if c, ok := line.Counters(); ok {
		// The guest keeps its counters in the memory under test. A counter that runs backwards is damage that the guest
		// itself cannot see.
		if c.TotalOps < l.last.TotalOps || c.TotalWrites < l.last.TotalWrites ||
			c.Corruptions < l.last.Corruptions || c.UptimeMS < l.last.UptimeMS {
			l.back = append(l.back, fmt.Sprintf("%+v after %+v", c, l.last))
		}
		l.last = c
	}
	l.addDevices(line)
	l.lines = append(l.lines, line)
	l.wake()
}

func (l *Log) garble(text string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.garbled = append(l.garbled, text)
	l.wake()
}

// wake wakes the callers of Wait. The caller holds l.mu.
func (l *Log) wake() {
	if l.changed != nil {
		close(l.changed)
		l.changed = nil
	}
}

// Len returns how many lines the log has; it is a position for Lines and Wait.
func (l *Log) Len() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.lines)
}

// Lines returns the lines from position from on. The caller must not change what they point to.
func (l *Log) Lines(from int) []Line {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]Line(nil), l.lines[min(from, len(l.lines)):]...)
}

// Garbled returns the lines that did not parse.
func (l *Log) Garbled() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]string(nil), l.garbled...)
}

// Last returns the newest counters.
func (l *Log) Last() Counters {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.last
}

// ErrDamaged is what Err returns, with details, for a guest whose memory does not hold what it wrote.
var ErrDamaged = errors.New("guest memory is damaged")

// Err returns nil if nothing in the log shows damage: no corruption is counted, no counter ever ran backwards, and no
// disk failed (ErrDisk).
func (l *Log) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.back) > 0 {
		return fmt.Errorf("%w: counters ran backwards: %s", ErrDamaged, l.back[0])
	}
	first := "no details were reported"
	for _, line := range l.lines {
		if c := line.Corruption; c != nil && c.Disk == "" {
			first = fmt.Sprintf("first: page %d, word %d is %s, not %s (%s)", c.Page, c.Word, c.Got, c.Expected, c.Kind)
			break
		}
	}
	if n := l.last.Corruptions; n > 0 {
		return fmt.Errorf("%w: %d corruptions; %s", ErrDamaged, n, first)
	}
	return l.disksErr()
}

// linesOrWait returns the lines from position from on or, if there are none, a channel that is closed when there may be
// some.
func (l *Log) linesOrWait(from int) ([]Line, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if from < len(l.lines) {
		return append([]Line(nil), l.lines[from:]...), nil
	}
	if l.changed == nil {
		l.changed = make(chan struct{})
	}
	return nil, l.changed
}

// Wait returns the first line at or after position from that matches, and the position after it.
func (l *Log) Wait(ctx context.Context, from int, match func(Line) bool) (Line, int, error) {
	for {
		lines, changed := l.linesOrWait(from)
		for _, line := range lines {
			from++
			if match(line) {
				return line, from, nil
			}
		}
		if len(lines) > 0 {
			continue
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return Line{}, from, fmt.Errorf("waiting for a guest line (%d lines so far, %d garbled): %w",
				l.Len(), len(l.Garbled()), context.Cause(ctx))
		}
	}
}

// WaitReady waits until the guest has stamped its memory.
func (l *Log) WaitReady(ctx context.Context) (*Ready, error) {
	line, _, err := l.Wait(ctx, 0, func(l Line) bool { return l.Ready != nil || l.Error != nil })
	if err != nil {
		return nil, err
	}
	if line.Error != nil {
		return nil, fmt.Errorf("guest: %s", line.Error.Message)
	}
	return line.Ready, nil
}
