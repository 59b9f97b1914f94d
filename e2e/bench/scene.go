// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/image"
	"github.com/migrated-vm/migrated/e2e/lab"
)

// A scene is two hosts with their daemons, and a VM that goes from one to the other and back.
type scene struct {
	bench   benchCase
	dir     string // of its logs
	lab     *lab.Lab
	vm      lab.VMConfig
	at      *lab.Host // where the VM is
	daemons map[*lab.Host][]*lab.Process
	// credentials are for the daemons that use TLS, and for QEMU; nil in a scene without TLS.
	credentials *credentials
	serial      *serial
	guest       report.Log
	moves       int
}

// measure runs one case on a scene of its own, for as many rounds as there is time for, and at least one.
func (c benchCase) measure(ctx context.Context, o options, until time.Time) (_ *caseReport, err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	s, err := c.stage(ctx, o)
	if err != nil {
		return nil, err
	}
	defer func() { err = s.close(err) }()
	result := newCaseReport(c)
	for round := range o.rounds {
		if round > 0 && time.Now().After(until) {
			fmt.Printf("   no time for round %d\n", round+1)
			break
		}
		for _, who := range order(c.contenders(), round) {
			f, err := s.move(ctx, who)
			if err != nil {
				return nil, fmt.Errorf("round %d, %s: %w", round+1, who.name, err)
			}
			result.add(who, f)
			fmt.Printf("   round %d, %-16s %v\n", round+1, who.name, f)
		}
		if err := s.verify(ctx); err != nil {
			return nil, fmt.Errorf("after round %d: %w", round+1, err)
		}
		result.Rounds++
	}
	result.finish()
	return result, nil
}

// stage makes the hosts, starts the daemons with the further arguments serve, and boots the VM on host a. If the case
// has contenders with TLS, each host has a second daemon, which uses it.
func (c benchCase) stage(ctx context.Context, o options, serve ...string) (_ *scene, err error) {
	kernel, initrd, err := image.LinuxWithVirtio(ctx)
	if err != nil {
		return nil, err
	}
	s := &scene{bench: c, dir: o.dir, vm: c.vm(kernel, initrd), daemons: map[*lab.Host][]*lab.Process{}}
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
			err = errors.Join(err, s.end())
		}
	}()
	if slices.ContainsFunc(c.contenders(), func(who contender) bool { return who.name == oursTLS }) {
		if s.credentials, err = certify(s.lab.Hosts()...); err != nil {
			return nil, err
		}
	}
	for _, h := range s.lab.Hosts() {
		if err := errors.Join(h.UseQEMU(ctx, c.qemu), h.MakeVMDir()); err != nil {
			return nil, err
		}
		if err := s.startDaemon(s.daemonLog(h), h, func(log *os.File) (*lab.Process, error) {
			return h.StartDaemon(ctx, log, serve...)
		}); err != nil {
			return nil, err
		}
		if s.credentials == nil {
			continue
		}
		if err := s.startDaemon(s.secondLog(h), h, func(log *os.File) (*lab.Process, error) {
			return h.StartSecondDaemon(ctx, log, append(s.credentials.serve(h), serve...)...)
		}); err != nil {
			return nil, err
		}
	}
	s.at = s.lab.A
	if s.serial, err = followSerial(ctx, s.lab, &s.guest); err != nil {
		return nil, err
	}
	var ready report.Log // s.guest has the same lines, and follows the guest further
	port, err := s.at.Boot(ctx, s.vm, &ready)
	if err != nil {
		return nil, err
	}
	if err := port.Close(); err != nil {
		return nil, err
	}
	if _, err := s.guest.WaitReady(ctx); err != nil {
		return nil, err
	}
	return s, nil
}

// startDaemon starts one of a host's daemons and writes its log to path.
func (s *scene) startDaemon(path string, h *lab.Host, start func(*os.File) (*lab.Process, error)) error {
	log, err := os.Create(path)
	if err != nil {
		return err
	}
	defer log.Close() // the daemon has its own
	d, err := start(log)
	if err != nil {
		return fmt.Errorf("%w; see %s", err, path)
	}
	s.daemons[h] = append(s.daemons[h], d)
	return nil
}

// daemonLog returns the path of the log of a host's daemon, secondLog that of its daemon that uses TLS.
func (s *scene) daemonLog(h *lab.Host) string { return filepath.Join(s.dir, "migrated-"+h.Name+".log") }
func (s *scene) secondLog(h *lab.Host) string {
	return filepath.Join(s.dir, "migrated-"+h.Name+"-tls.log")
}

func (s *scene) end() error {
	err := s.lab.Close()
	if s.credentials != nil {
		err = errors.Join(err, s.credentials.remove())
	}
	return err
}

// close ends the scene. reason is why, or nil. It returns reason joined with what went wrong at the end.
func (s *scene) close(reason error) error {
	if reason != nil {
		reason = errors.Join(reason, s.keepConsoles())
	}
	return errors.Join(reason, s.end())
}

// keepConsoles saves the guest's kernel log, which would be lost with the hosts.
func (s *scene) keepConsoles() error {
	var errs []error
	for _, h := range s.lab.Hosts() {
		text, err := os.ReadFile(h.Path(lab.ConsoleLog))
		if errors.Is(err, os.ErrNotExist) {
			continue // the VM was never there
		}
		errs = append(errs, err, os.WriteFile(filepath.Join(s.dir, "console-"+h.Name+".log"), text, 0o644))
	}
	return errors.Join(errs...)
}

// before is how long the guest works undisturbed before each move. Its speed in that time is the speed that it should
// come back to.
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
	pings, stopErr := pinger.StopWithin(lastAnswers)
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
	if who.move == nil {
		return s.stay(ctx)
	}
	s.moves++
	from, to := s.at, s.lab.Other(s.at)
	meter, err := s.startMeter(ctx)
	if err != nil {
		return f, sw, err
	}
	wire := s.watchWire(from)
	defer wire.end()
	began := time.Now()
	watch, err := s.lab.WatchSwitch(ctx, from, to)
	if err != nil {
		return f, sw, err
	}
	var ended time.Time
	sw, err = watch.During(ctx, func() error {
		err := who.move(ctx, s, from, to, &f)
		ended = time.Now()
		return err
	}, func() {
		s.serial.follow(to)
		wire.runs()
	})
	wire.end()
	if err != nil {
		return f, sw, err
	}
	s.at = to
	f.Downtime, f.Residency = sw.Downtime(), ended.Sub(sw.Resumed)
	if err := meter.stop(ctx, &f); err != nil {
		return f, sw, err
	}
	if err := errors.Join(who.told(ctx, s, from, &f), who.end(ctx, from)); err != nil {
		return f, sw, err
	}
	if err := s.guestReports(ctx, sw); err != nil {
		return f, sw, err
	}
	f.ofWire(wire, sw.Resumed, ended)
	return f, sw, errors.Join(f.ofGuest(s.guest.Lines(0), began, sw.Resumed, s.bench), s.guest.Err())
}

// stay takes the same figures of a VM that is not moved, as if it had been switched over now.
func (s *scene) stay(ctx context.Context) (f figures, sw lab.Switch, err error) {
	meter, err := s.startMeter(ctx)
	if err != nil {
		return f, sw, err
	}
	now := time.Now()
	if err := s.guestReports(ctx, lab.Switch{Stopped: now, Resumed: now}); err != nil {
		return f, sw, err
	}
	if err := meter.stop(ctx, &f); err != nil {
		return f, sw, err
	}
	if err := f.ofGuest(s.guest.Lines(0), now, now, s.bench); err != nil {
		return f, sw, err
	}
	if triesLink(s.bench) {
		if err := s.bareTCP(ctx, &f); err != nil {
			return f, sw, err
		}
	}
	return f, lab.Switch{Stopped: now, Resumed: now}, s.guest.Err()
}

// guestWorks waits for d, and then for the guest's next report.
func (s *scene) guestWorks(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
	case <-ctx.Done():
		return ctx.Err()
	}
	_, _, err := s.guest.Wait(ctx, s.guest.Len(), func(l report.Line) bool { return l.Window != nil })
	return err
}

// guestReports waits until the guest has reported all operations after the switch that count. A guest that stalls as a
// whole reports late.
func (s *scene) guestReports(ctx context.Context, sw lab.Switch) error {
	switched := uptimeAt(s.guest.Lines(0), sw.Stopped)
	_, _, err := s.guest.Wait(ctx, s.guest.Len(), func(l report.Line) bool {
		return l.Window != nil && uptime(*l.Window)-switched > s.bench.after()
	})
	return err
}

// verify lets the guest check all its memory and its disks. One wrong page makes all figures worthless.
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

// check returns what the guest finds in its memory and on its disks. The guest's load rests meanwhile, because its
// requests would delay the reads of the check.
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
