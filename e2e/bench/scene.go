// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/image"
	"github.com/migrated-vm/migrated/e2e/lab"
)

// A scene is two hosts with their daemons, and a VM that goes from one to the
// other and back.
type scene struct {
	bench   benchCase
	dir     string // of its logs
	lab     *lab.Lab
	vm      lab.VMConfig
	at      *lab.Host // where the VM is
	daemons map[*lab.Host]*lab.Process
	serial  *serial
	guest   report.Log
	moves   int
}

// measure runs one case on a scene of its own.
func (c benchCase) measure(ctx context.Context, o options) (_ *caseReport, err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	s, err := c.stage(ctx, o)
	if err != nil {
		return nil, err
	}
	defer func() { err = s.close(err) }()
	result := newCaseReport(c)
	for round := range o.rounds {
		for _, who := range order(round) {
			f, err := s.move(ctx, who)
			if err != nil {
				return nil, fmt.Errorf("round %d, %s: %w", round+1, who.name, err)
			}
			result.add(who, f)
			fmt.Printf("   round %d, %-12s %v\n", round+1, who.name, f)
		}
		if err := s.verify(ctx); err != nil {
			return nil, fmt.Errorf("after round %d: %w", round+1, err)
		}
	}
	result.finish()
	return result, nil
}

// stage makes the hosts, starts the daemons and boots the VM on host a.
func (c benchCase) stage(ctx context.Context, o options) (_ *scene, err error) {
	boots := image.Linux
	if c.guest.real != nil {
		boots = image.LinuxWithVirtio
	}
	kernel, initrd, err := boots(ctx)
	if err != nil {
		return nil, err
	}
	s := &scene{bench: c, dir: o.dir, vm: c.vm(kernel, initrd), daemons: map[*lab.Host]*lab.Process{}}
	if c.network.link == nil {
		s.lab, err = lab.New(ctx)
	} else {
		s.lab, err = lab.NewWithLink(ctx, *c.network.link)
	}
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.lab.Close())
		}
	}()
	for _, h := range s.hosts() {
		if err := errors.Join(h.UseQEMU(ctx, o.qemu), h.MakeVMDir()); err != nil {
			return nil, err
		}
		log, err := os.Create(s.daemonLog(h))
		if err != nil {
			return nil, err
		}
		defer log.Close() // the daemon has its own
		if s.daemons[h], err = h.StartDaemon(ctx, log); err != nil {
			return nil, fmt.Errorf("%w; see %s", err, log.Name())
		}
	}
	s.at = s.lab.A
	if s.serial, err = followSerial(ctx, s.lab, &s.guest); err != nil {
		return nil, err
	}
	if _, err := s.at.StartVM(ctx, s.vm); err != nil {
		return nil, err
	}
	if _, err := s.guest.WaitReady(ctx); err != nil {
		return nil, err
	}
	return s, nil
}

// daemonLog is the log of a host's daemon.
func (s *scene) daemonLog(h *lab.Host) string { return filepath.Join(s.dir, "migrated-"+h.Name+".log") }

// close ends it all, for a reason or for none, and returns that and what went wrong with it.
func (s *scene) close(reason error) error {
	if reason != nil {
		reason = errors.Join(reason, s.keepConsoles())
	}
	return errors.Join(reason, s.lab.Close())
}

// keepConsoles saves what the guest's kernel said, which goes with the hosts.
func (s *scene) keepConsoles() error {
	var errs []error
	for _, h := range s.hosts() {
		text, err := os.ReadFile(h.Path(lab.ConsoleLog))
		if errors.Is(err, os.ErrNotExist) {
			continue // the VM was never there
		}
		errs = append(errs, err, os.WriteFile(filepath.Join(s.dir, "console-"+h.Name+".log"), text, 0o644))
	}
	return errors.Join(errs...)
}

func (s *scene) hosts() []*lab.Host { return []*lab.Host{s.lab.A, s.lab.B} }

func (s *scene) other() *lab.Host {
	if s.at == s.lab.A {
		return s.lab.B
	}
	return s.lab.A
}

// before is how long the guest works in peace before each move: its speed then is what it is to come back to.
const before = 1500 * time.Millisecond

// move lets a contender move the VM to the other host, and waits until all that is counted has happened.
func (s *scene) move(ctx context.Context, who contender) (figures, error) {
	pinger, err := s.ping()
	if err != nil {
		return figures{}, err
	}
	f, sw, err := s.moveUnpinged(ctx, who)
	if pinger == nil {
		return f, err
	}
	pings, stopErr := pinger.Stop()
	if err := errors.Join(err, stopErr); err != nil {
		return f, err
	}
	f.ofClient(pings, sw, s.bench)
	return f, nil
}

func (s *scene) moveUnpinged(ctx context.Context, who contender) (f figures, sw lab.Switch, err error) {
	if err := s.guestWorks(ctx, before); err != nil {
		return f, sw, err
	}
	s.moves++
	from, to := s.at, s.other()
	meter, err := s.startMeter(ctx, from, to)
	if err != nil {
		return f, sw, err
	}
	began := time.Now()
	watch, err := s.lab.WatchSwitch(ctx, from, to)
	if err != nil {
		return f, sw, err
	}
	var ended time.Time
	sw, err = watch.During(ctx, func() error {
		err := who.move(ctx, s, from, to)
		ended = time.Now()
		return err
	}, func() { s.serial.follow(to) })
	if err != nil {
		return f, sw, err
	}
	s.at = to
	f.Downtime, f.Residency = sw.Downtime(), ended.Sub(sw.Resumed)
	if err := meter.stop(ctx, &f); err != nil {
		return f, sw, err
	}
	if err := who.end(ctx, from); err != nil {
		return f, sw, err
	}
	if err := s.guestWorks(ctx, time.Until(sw.Resumed.Add(s.bench.after()))); err != nil {
		return f, sw, err
	}
	f.ofGuest(s.guest.Lines(0), began, sw.Resumed, s.bench)
	return f, sw, s.guest.Err()
}

// guestWorks waits so long, and then for the guest's next report.
func (s *scene) guestWorks(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
	case <-ctx.Done():
		return ctx.Err()
	}
	_, _, err := s.guest.Wait(ctx, s.guest.Len(), func(l report.Line) bool { return l.Window != nil })
	return err
}

// verify lets the guest check all its memory and its disks. No figure is worth anything if one page is wrong.
func (s *scene) verify(ctx context.Context) error {
	v, err := s.check(ctx)
	if err != nil {
		return err
	}
	if v.Found > 0 || v.Corruptions > 0 || v.BlocksFound > 0 {
		return fmt.Errorf("%w: the guest found %d pages wrong, %d of them only now, and %d blocks of its disks",
			report.ErrDamaged, v.Corruptions, v.Found, v.BlocksFound)
	}
	return nil
}

// check is what the guest finds in its memory and on its disks. It rests meanwhile: what it reads would have to wait for
// what it does.
func (s *scene) check(ctx context.Context) (_ *report.Verified, err error) {
	var answers report.Log
	port, err := s.at.Guest(ctx, &answers)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, port.Close()) }()
	if _, err := port.SetLoad(ctx, false); err != nil {
		return nil, err
	}
	v, err := port.Verify(ctx)
	if err != nil {
		return nil, err
	}
	_, err = port.SetLoad(ctx, true)
	return v, err
}
