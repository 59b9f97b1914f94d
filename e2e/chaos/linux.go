// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/lab"
)

// linuxChecker asks the guest, which finds damage by itself, and collects its reports on both hosts.
type linuxChecker struct {
	ctx       context.Context //nolint:containedctx // of the listeners, ends with the machine
	path      string
	listeners map[*lab.Host]*listener
	before    report.Counters // the newest before the migration; no counter may ever be less
}

// A listener collects the reports of a guest on one host, until another guest runs there or this one begins anew.
type listener struct {
	log  report.Log
	file *os.File
	end  context.CancelFunc
	done chan struct{}

	// port is for commands, and stays open as long as the guest is there. When a client hangs up, QEMU may write the byte
	// that is on its way to the log twice, and one digit more makes another number. While it is open, QEMU writes a byte
	// to the log again whenever the port has no room for it at once. Many lines are too long for the port, so the log has
	// such repetitions; answers has all lines as they were sent.
	port    *report.Port
	answers report.Log
}

// logs returns all that was collected.
func (e *listener) logs() []*report.Log { return []*report.Log{&e.log, &e.answers} }

// listen collects what is written to the file at path from now on.
func listen(ctx context.Context, path string) (*listener, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o666)
	if err != nil {
		return nil, err
	}
	if _, err := f.Seek(0, io.SeekEnd); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	e := &listener{file: f, done: make(chan struct{})}
	ctx, e.end = context.WithCancel(ctx)
	go func() {
		defer close(e.done)
		_ = e.log.Follow(report.Tail(ctx, f)) // it ends with ctx; a caller that waits for missing lines gets the error
	}()
	return e, nil
}

func (e *listener) close() {
	e.end()
	<-e.done
	_ = e.file.Close() // was only read
	if e.port != nil {
		_ = e.port.Close() // its QEMU has ended, or will
	}
}

// verify makes the guest check its memory; socket is its serial port.
func (e *listener) verify(ctx context.Context, socket string) (*report.Verified, error) {
	if err := e.open(ctx, socket); err != nil {
		return nil, err
	}
	return e.port.Verify(ctx)
}

func (e *listener) open(ctx context.Context, socket string) (err error) {
	if e.port == nil {
		e.port, err = report.Open(ctx, socket, &e.answers)
	}
	return err
}

// awake returns nil if the guest answers.
func (e *listener) awake(ctx context.Context, socket string) error {
	if err := e.open(ctx, socket); err != nil {
		return err
	}
	_, err := e.port.SetLoad(ctx, true)
	return err
}

// left starts a new listener. A line may have begun on one host and ended on the other, and a VM that fell back repeats
// what it said before.
func (c *linuxChecker) left(h *lab.Host) (err error) {
	if old := c.listeners[h]; old != nil {
		old.close()
	}
	c.listeners[h], err = listen(c.ctx, h.Path(c.path))
	return err
}

func (c *linuxChecker) begin(_ context.Context, m *machine) error {
	c.before = c.listeners[m.at].log.Last()
	return nil
}

func (c *linuxChecker) verify(ctx context.Context, m *machine) (damage, error) {
	here := c.listeners[m.at]
	v, err := here.verify(ctx, m.at.Path(m.path(lab.SerialPath)))
	if err != nil {
		return damage{}, fmt.Errorf("the guest does not check its memory: %w", err)
	}
	if err := works(ctx, &here.answers, v.Disks, v.Cards); err != nil {
		return damage{}, err
	}
	corruptions := max(v.Found, v.Corruptions-c.before.Corruptions)
	var errs []error
	if corruptions > 0 {
		errs = append(errs, fmt.Errorf("%w: it found %d pages wrong, %d of them only now",
			report.ErrDamaged, v.Corruptions, v.Found))
	}
	if v.TotalOps < c.before.TotalOps || v.TotalWrites < c.before.TotalWrites || v.UptimeMS < c.before.UptimeMS {
		errs = append(errs, fmt.Errorf("%w: it is of before the migration: %+v after %+v",
			report.ErrDamaged, v.Counters, c.before))
	}
	for _, card := range v.Cards {
		if card.Wrong > 0 {
			errs = append(errs, fmt.Errorf("%w: not what was sent came back over the network: %+v", report.ErrDamaged, card))
		}
	}
	found, err := c.said()
	err = errors.Join(append(errs, err)...)
	if err != nil {
		found.pages = max(1, found.pages, corruptions)
	}
	if m.config.Disks > 0 && v.Blocks == 0 {
		err = errors.Join(err, errors.New("the guest has checked no block of its disks"))
	}
	if v.BlocksFound > 0 && found.blocks == 0 {
		found.blocks, found.detail = v.BlocksFound, fmt.Sprintf("%d of %d blocks are wrong", v.BlocksFound, v.Blocks)
	}
	return found, err
}

// works waits until the guest has visited memory, and used each disk and each network card more often than disks and
// cards say.
func works(ctx context.Context, heard *report.Log, disks []report.Disk, cards []report.Card) error {
	_, _, err := heard.Wait(ctx, heard.Len(), func(l report.Line) bool {
		w := l.Window
		if w == nil || w.Ops == 0 || len(w.Disks) != len(disks) || len(w.Cards) != len(cards) {
			return false
		}
		for i, d := range w.Disks {
			if d.Writes <= disks[i].Writes {
				return false
			}
		}
		for i, c := range w.Cards {
			if c.Answered <= cards[i].Answered {
				return false
			}
		}
		return true
	})
	if err != nil {
		garbled := heard.Garbled()
		return fmt.Errorf("the guest does not work: %w; disks before %+v, now %+v; cards before %+v, now %+v; "+
			"garbled: %.600q", err, disks, heard.Disks(), cards, heard.Cards(), garbled[max(0, len(garbled)-4):])
	}
	return nil
}

func (c *linuxChecker) said() (damage, error) {
	var found damage
	var errs []error
	for _, e := range c.listeners {
		for _, log := range e.logs() {
			blocks := uint64(0)
			for _, d := range log.Disks() {
				blocks += d.Corruptions + d.Errors
			}
			found.blocks = max(found.blocks, blocks)
			switch err := log.Err(); {
			case errors.Is(err, report.ErrDisk):
				found.detail = err.Error()
			case err != nil:
				found.pages = max(1, found.pages, log.Last().Corruptions)
				errs = append(errs, err)
			}
		}
	}
	return found, errors.Join(errs...)
}

func (c *linuxChecker) stall(since time.Time) time.Duration {
	var lines []report.Line
	for _, e := range c.listeners {
		for _, log := range e.logs() {
			for _, l := range log.Lines(0) {
				if l.Window != nil && l.At.After(since) {
					lines = append(lines, l)
				}
			}
		}
	}
	slices.SortFunc(lines, func(a, b report.Line) int { return a.At.Compare(b.At) })
	var longest time.Duration
	for i, l := range lines {
		longest = max(longest, time.Duration(l.Window.MaxUS)*time.Microsecond)
		if i > 0 {
			longest = max(longest, report.Late(lines[i-1].Window, l.Window, reporting))
		}
	}
	return longest
}

func (c *linuxChecker) forget(ctx context.Context, m *machine) error {
	c.before = report.Counters{}
	if err := c.left(m.at); err != nil {
		return err
	}
	here, socket := c.listeners[m.at], m.at.Path(m.path(lab.SerialPath))
	var err error
	if !await(ctx, bootTime, func() bool {
		// A guest that boots loses commands.
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		err = here.awake(ctx, socket)
		return err == nil
	}) {
		return fmt.Errorf("the guest has not booted within %v: %w", bootTime, err)
	}
	return nil
}

func (c *linuxChecker) close() {
	for _, e := range c.listeners {
		e.close()
	}
}
