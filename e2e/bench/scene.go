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
	s, err := c.stage(ctx, o.dir)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.keepConsoles(o.dir))
		}
		err = errors.Join(err, s.lab.Close())
	}()
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
func (c benchCase) stage(ctx context.Context, dir string) (_ *scene, err error) {
	boots := image.Linux
	if c.guest.real != nil {
		boots = image.LinuxWithVirtio
	}
	kernel, initrd, err := boots(ctx)
	if err != nil {
		return nil, err
	}
	s := &scene{bench: c, vm: c.vm(kernel, initrd), daemons: map[*lab.Host]*lab.Process{}}
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
		if err := h.MakeVMDir(); err != nil {
			return nil, err
		}
		log, err := os.Create(filepath.Join(dir, "migrated-"+h.Name+".log"))
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

// keepConsoles saves what the guest's kernel said, which goes with the hosts.
func (s *scene) keepConsoles(dir string) error {
	var errs []error
	for _, h := range s.hosts() {
		text, err := os.ReadFile(h.Path(lab.ConsoleLog))
		if errors.Is(err, os.ErrNotExist) {
			continue // the VM was never there
		}
		errs = append(errs, err, os.WriteFile(filepath.Join(dir, "console-"+h.Name+".log"), text, 0o644))
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
	if err := s.guestWorks(ctx, before); err != nil {
		return figures{}, err
	}
	s.moves++
	from, to := s.at, s.other()
	meter, err := s.startMeter(ctx, from, to)
	if err != nil {
		return figures{}, err
	}
	began := time.Now()
	switched := make(chan result[lab.Switch], 1)
	watch, err := s.lab.WatchSwitch(ctx, from, to)
	if err != nil {
		return figures{}, err
	}
	go func() {
		sw, err := watch.Wait(ctx)
		s.serial.follow(to)
		switched <- result[lab.Switch]{sw, err}
	}()
	if err := who.move(ctx, s, from, to); err != nil {
		return figures{}, err
	}
	ended := time.Now()
	sw := <-switched
	if sw.err != nil {
		return figures{}, sw.err
	}
	s.at = to
	f := figures{
		Downtime:  sw.value.Downtime(),
		Residency: ended.Sub(sw.value.Resumed),
	}
	if err := meter.stop(ctx, &f); err != nil {
		return f, err
	}
	if err := who.end(ctx, from); err != nil {
		return f, err
	}
	if err := s.guestWorks(ctx, time.Until(sw.value.Resumed.Add(s.bench.after()))); err != nil {
		return f, err
	}
	f.ofGuest(s.guest.Lines(0), began, sw.value.Resumed, s.bench)
	return f, s.guest.Err()
}

type result[T any] struct {
	value T
	err   error
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

// verify lets the guest check all its memory. No figure is worth anything if one page is wrong.
func (s *scene) verify(ctx context.Context) (err error) {
	var answers report.Log
	port, err := s.at.Guest(ctx, &answers)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, port.Close()) }()
	v, err := port.Verify(ctx)
	if err != nil {
		return err
	}
	if v.Found > 0 || v.Corruptions > 0 || v.BlocksFound > 0 {
		return fmt.Errorf("%w: the guest found %d pages wrong, %d of them only now, and %d blocks of its disks",
			report.ErrDamaged, v.Corruptions, v.Found, v.BlocksFound)
	}
	return nil
}
