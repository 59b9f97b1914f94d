// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"syscall"
	"time"

	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/internal/migration"
)

// Kinds of faults by libvirt and its users, which only domains meet.
const (
	killSourceLibvirtd         = "kill-source-libvirtd"
	killDestinationLibvirtd    = "kill-destination-libvirtd"
	killBothLibvirtds          = "kill-both-libvirtds"
	killSourceServices         = "kill-source-daemon-and-libvirtd"
	killDestinationServices    = "kill-destination-daemon-and-libvirtd"
	restartSourceLibvirtd      = "restart-source-libvirtd"
	restartDestinationLibvirtd = "restart-destination-libvirtd"
	freezeSourceLibvirtd       = "freeze-source-libvirtd"
	freezeDestinationLibvirtd  = "freeze-destination-libvirtd"
	destroySource              = "destroy-source-domain"
	destroyWaiting             = "destroy-waiting-domain"
	destroyRunning             = "destroy-running-domain"
	suspendVM                  = "suspend-and-resume"
)

// libvirtDeck is the deck of machines that are domains. It lacks:
//   - full-tmpfs, full-huge-pages and foreign-mapper: they need RAM in a file that has a name, and a memfd has none;
//   - crowd: it is made of guests that have no devices, and whose RAM is read by the suite.
//
// Others are done by virsh: continue-source is "virsh resume" of the domain that was stopped for the switch,
// continue-destination is that of the domain that waits, and snapshot-disk is "virsh snapshot-create-as".
var libvirtDeck = []string{
	killSource, killSource, killDestination, killDestination, killBoth,
	stopSource, stopDestination, killTheirQEMU, killTheirHost, killOurQEMU, pullCable, cutBoth, cutOne, badLink,
	freezeSource, freezeDestination, freezeTheirQEMU, flipBits, lyingSource,
	quitVM, powerOff, resetGuest, panicGuest, continueSource, continueSource, continueDestination, snapshotDisk,
	killSourceLibvirtd, killSourceLibvirtd, killDestinationLibvirtd, killDestinationLibvirtd, killBothLibvirtds,
	killSourceServices, killDestinationServices, restartSourceLibvirtd, restartDestinationLibvirtd,
	freezeSourceLibvirtd, freezeDestinationLibvirtd, destroySource, destroyWaiting, destroyRunning, suspendVM,
}

// libvirtMemories are the kinds of RAM that domains have: what QEMU takes by default, and a shared memfd.
var libvirtMemories = []lab.Backend{lab.BackendDefault, lab.BackendDefault, lab.BackendMemfd}

// libvirtFault fills in a fault that only domains meet.
func (s *stage) libvirtFault(f *fault, kind string, j *journey, r *rand.Rand) error {
	switch kind {
	case killSourceLibvirtd:
		s.killLibvirtd(f, j.from)
	case killDestinationLibvirtd:
		s.killLibvirtd(f, j.to)
	case killBothLibvirtds:
		s.killLibvirtd(f, j.from, j.to)
	case killSourceServices:
		s.killServices(f, killSource, j.from, j, r)
	case killDestinationServices:
		s.killServices(f, killDestination, j.to, j, r)
	case restartSourceLibvirtd:
		s.restartLibvirtd(f, j.from)
	case restartDestinationLibvirtd:
		s.restartLibvirtd(f, j.to)
	case freezeSourceLibvirtd:
		s.freezeLibvirtd(f, j.from)
	case freezeDestinationLibvirtd:
		s.freezeLibvirtd(f, j.to)
	case destroySource:
		s.destroySource(f, j)
	case destroyWaiting:
		f.meanwhile(func(ctx context.Context) error { return j.destroy(ctx, j.to) })
	case destroyRunning:
		s.destroyRunning(f, j)
	case suspendVM:
		s.suspend(f, j)
	default:
		return fmt.Errorf("no fault is called %q", kind)
	}
	return nil
}

func (s *stage) killLibvirtd(f *fault, hosts ...*lab.Host) {
	f.begin = func(context.Context) error { return s.killLibvirtds(hosts...) }
	f.end = s.reviveLibvirtds
}

// killServices kills a host's daemon and its libvirtd at once. They are started again in either order, because neither
// may depend on the other.
func (s *stage) killServices(f *fault, kind string, h *lab.Host, j *journey, r *rand.Rand) {
	s.killDaemons(f, kind, j)
	f.too = func(context.Context) error { return s.killLibvirtds(h) }
	revive := []func(context.Context) error{s.reviveDaemons, s.reviveLibvirtds}
	f.detail = "the daemon comes back first"
	if r.IntN(2) == 1 {
		revive[0], revive[1] = revive[1], revive[0]
		f.detail = "libvirtd comes back first"
	}
	f.end = func(ctx context.Context) error {
		err := revive[0](ctx)
		pause(ctx, time.Second)
		return errors.Join(err, revive[1](ctx))
	}
}

// restartLibvirtd is what an upgrade of libvirt does.
func (s *stage) restartLibvirtd(f *fault, h *lab.Host) {
	f.begin = func(ctx context.Context) error { return errors.Join(s.stopLibvirtd(ctx, h), s.reviveLibvirtds(ctx)) }
}

func (s *stage) freezeLibvirtd(f *fault, h *lab.Host) {
	f.begin = func(context.Context) error { return s.signalLibvirtd(h, syscall.SIGSTOP) }
	f.end = func(context.Context) error { return s.signalLibvirtd(h, syscall.SIGCONT) }
}

// destroy makes libvirt end the machine's domain on h.
func (j *journey) destroy(ctx context.Context, h *lab.Host) error {
	_, err := virsh(ctx, h, "destroy", j.machine.name)
	if isRefused(err) {
		return fmt.Errorf("%w: %w", errTooLate, err)
	}
	return err
}

// destroySource ends the source's domain: the VM, or what is left of it there, with the memory that has not crossed.
func (s *stage) destroySource(f *fault, j *journey) {
	f.meanwhile(func(ctx context.Context) error {
		j.ended, j.orphaned = !j.switched(), true
		return j.destroy(ctx, j.from)
	})
}

// destroyRunning ends the domain that runs the VM.
func (s *stage) destroyRunning(f *fault, j *journey) {
	f.meanwhile(func(ctx context.Context) error {
		h, _ := j.client()
		j.ended, j.orphaned = true, h == j.from // as quit does
		return j.destroy(ctx, h)
	})
}

// suspend pauses the VM, as an operator does, and continues it when migrated has said on which host it is.
// (continue-source instead continues a VM that stands still for a switch.)
func (s *stage) suspend(f *fault, j *journey) {
	f.meanwhile(func(ctx context.Context) error {
		h, _ := j.client()
		return j.machine.runner.setRunning(ctx, j.machine, h, false)
	})
	suspended := f.end
	f.end = func(ctx context.Context) error {
		if err := suspended(ctx); err != nil {
			return err
		}
		if !await(ctx, patience, func() bool {
			m, err := j.view(ctx, j.from)
			return j.switched() || err == nil && (m == nil || migration.Terminal(m.GetState()))
		}) {
			return fmt.Errorf("nobody knows where the VM is that was suspended: %s", j.situation(ctx))
		}
		h := j.from
		if m, err := j.view(ctx, j.from); j.switched() || err == nil && m != nil && complete(m) {
			h = j.to
		}
		return j.machine.runner.setRunning(ctx, j.machine, h, true)
	}
}
