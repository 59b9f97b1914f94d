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

// linuxJudge asks the guest, which finds damage by itself, and listens to what it says on both hosts.
type linuxJudge struct {
	ctx    context.Context //nolint:containedctx // of listening, ends with the machine
	path   string
	ears   map[*lab.Host]*ear
	before report.Counters // the newest before the migration; none may ever be less
}

// An ear hears what a guest says on one host for as long as it is the same guest with the same past.
type ear struct {
	log  report.Log
	file *os.File
	end  context.CancelFunc
	done chan struct{}

	// port is for commands, and stays open as long as the guest is there: when a client hangs up, QEMU may write the byte
	// that is on its way to the log twice, and one digit more makes another number. While it is open, QEMU writes each
	// byte to the log again that the port has no room for at once, which many lines are too long for: answers has them
	// all.
	port    *report.Port
	answers report.Log
}

// logs are all that was heard.
func (e *ear) logs() []*report.Log { return []*report.Log{&e.log, &e.answers} }

// listen hears what is written to the file at path from now on.
func listen(ctx context.Context, path string) (*ear, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o666)
	if err != nil {
		return nil, err
	}
	if _, err := f.Seek(0, io.SeekEnd); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	e := &ear{file: f, done: make(chan struct{})}
	ctx, e.end = context.WithCancel(ctx)
	go func() {
		defer close(e.done)
		_ = e.log.Follow(report.Tail(ctx, f)) // ends with ctx; what is missing then, somebody waits for
	}()
	return e, nil
}

func (e *ear) close() {
	e.end()
	<-e.done
	_ = e.file.Close() // was only read
	if e.port != nil {
		_ = e.port.Close() // its QEMU is gone, or is to go
	}
}

// verify has the guest check its memory; socket is its serial port.
func (e *ear) verify(ctx context.Context, socket string) (*report.Verified, error) {
	if err := e.open(ctx, socket); err != nil {
		return nil, err
	}
	return e.port.Verify(ctx)
}

func (e *ear) open(ctx context.Context, socket string) (err error) {
	if e.port == nil {
		e.port, err = report.Open(ctx, socket, &e.answers)
	}
	return err
}

// awake returns nil if the guest answers.
func (e *ear) awake(ctx context.Context, socket string) error {
	if err := e.open(ctx, socket); err != nil {
		return err
	}
	_, err := e.port.SetLoad(ctx, true)
	return err
}

// left begins to listen anew: a line may have begun on one host and ended on the other, and a VM that fell back says
// for the second time what another has said.
func (j *linuxJudge) left(h *lab.Host) (err error) {
	if old := j.ears[h]; old != nil {
		old.close()
	}
	j.ears[h], err = listen(j.ctx, h.Path(j.path))
	return err
}

func (j *linuxJudge) begin(_ context.Context, m *machine) error {
	j.before = j.ears[m.at].log.Last()
	return nil
}

func (j *linuxJudge) verify(ctx context.Context, m *machine) (damage, error) {
	here := j.ears[m.at]
	v, err := here.verify(ctx, m.at.Path(m.path(lab.SerialPath)))
	if err != nil {
		return damage{}, fmt.Errorf("the guest does not check its memory: %w", err)
	}
	if err := works(ctx, &here.answers, v.Disks, v.Cards); err != nil {
		return damage{}, err
	}
	corruptions := max(v.Found, v.Corruptions-j.before.Corruptions)
	var errs []error
	if corruptions > 0 {
		errs = append(errs, fmt.Errorf("%w: it found %d pages wrong, %d of them only now", report.ErrDamaged, v.Corruptions, v.Found))
	}
	if v.TotalOps < j.before.TotalOps || v.TotalWrites < j.before.TotalWrites || v.UptimeMS < j.before.UptimeMS {
		errs = append(errs, fmt.Errorf("%w: it is of before the migration: %+v after %+v", report.ErrDamaged, v.Counters, j.before))
	}
	for _, card := range v.Cards {
		if card.Wrong > 0 {
			errs = append(errs, fmt.Errorf("%w: not what was sent came back over the network: %+v", report.ErrDamaged, card))
		}
	}
	found, err := j.said()
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

// works waits until the guest has visited memory, and done more than that with each disk and each network card.
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

func (j *linuxJudge) said() (damage, error) {
	var found damage
	var errs []error
	for _, e := range j.ears {
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

func (j *linuxJudge) stall(since time.Time) time.Duration {
	var lines []report.Line
	for _, e := range j.ears {
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

func (j *linuxJudge) forget(ctx context.Context, m *machine) error {
	j.before = report.Counters{}
	if err := j.left(m.at); err != nil {
		return err
	}
	here, socket := j.ears[m.at], m.at.Path(m.path(lab.SerialPath))
	var err error
	if !await(ctx, bootTime, func() bool {
		// A guest that boots loses what it was told.
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		err = here.awake(ctx, socket)
		return err == nil
	}) {
		return fmt.Errorf("the guest has not booted within %v: %w", bootTime, err)
	}
	return nil
}

func (j *linuxJudge) close() {
	for _, e := range j.ears {
		e.close()
	}
}
