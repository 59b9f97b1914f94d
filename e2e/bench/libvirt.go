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
	"github.com/migrated-vm/migrated/e2e/jsonfile"
	"github.com/migrated-vm/migrated/e2e/lab"
)

// The ways in which a VM with a disk, a network card and what libvirt adds goes from host to host.
const (
	domainByUs      = "libvirt's domain, by migrated"
	domainByLibvirt = "libvirt's domain, by virsh migrate --postcopy"
	plainByUs       = "the same VM without libvirt, by migrated"
)

// libvirtReport is libvirt.json: downtimes in ms.
type libvirtReport struct {
	QEMU     string             `json:"qemu"` // its version
	Downtime map[string]*spread `json:"downtime_ms"`
}

// compareLibvirt moves a domain by migrated and by libvirt's own post-copy, in turns, and then a VM with the same
// devices without libvirt by migrated.
func compareLibvirt(ctx context.Context, o options) (err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	allowed, err := allowUserfaultfd()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, allowed()) }()
	s, err := stageLibvirt(ctx, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.lab.Close()) }()
	r := libvirtReport{QEMU: o.qemu, Downtime: map[string]*spread{domainByUs: {}, domainByLibvirt: {}, plainByUs: {}}}
	add := func(way string, move func(context.Context, *lab.Host, *lab.Host) error, events string) error {
		downtime, err := s.move(ctx, move, events)
		if err != nil {
			return fmt.Errorf("%s: %w", way, err)
		}
		fmt.Printf("   %-46s %6.2f ms\n", way, downtime)
		r.Downtime[way].All = append(r.Downtime[way].All, downtime)
		return nil
	}
	if err := s.startDomain(ctx); err != nil {
		return err
	}
	for range o.rounds {
		err := errors.Join(add(domainByUs, s.byUs(lab.DomainVM), lab.DomainEventsPath),
			add(domainByLibvirt, byVirsh, lab.DomainEventsPath))
		if err != nil {
			return err
		}
	}
	if err := s.startPlain(ctx); err != nil {
		return err
	}
	for range o.rounds {
		if err := add(plainByUs, s.byUs(lab.QMPPath), lab.EventsPath); err != nil {
			return err
		}
	}
	for _, of := range r.Downtime {
		of.finish()
	}
	r.print()
	return jsonfile.Write(filepath.Join(o.dir, "libvirt.json"), r)
}

func (r libvirtReport) print() {
	fmt.Printf("QEMU %s, medians of %d moves (least–most)\n", r.QEMU, len(r.Downtime[plainByUs].All))
	for _, way := range []string{domainByUs, plainByUs, domainByLibvirt} {
		fmt.Printf("%-46s %v ms\n", way, r.Downtime[way])
	}
	ours := r.Downtime[domainByUs].Median
	fmt.Printf("libvirt adds %.2f ms; the domain's downtime is %.2f of that by virsh migrate --postcopy\n",
		ours-r.Downtime[plainByUs].Median, ours/r.Downtime[domainByLibvirt].Median)
}

// allowUserfaultfd lets a QEMU of another user than root have a userfaultfd for the whole VM. libvirt's own post-copy
// needs that, and its package sets it by a file. takeBack sets what was there before.
func allowUserfaultfd() (takeBack func() error, err error) {
	const knob = "/proc/sys/vm/unprivileged_userfaultfd"
	before, err := os.ReadFile(knob)
	if err != nil {
		return nil, err
	}
	return func() error { return os.WriteFile(knob, before, 0o644) }, os.WriteFile(knob, []byte("1"), 0o644)
}

// A libvirtScene is two hosts with a daemon and a libvirtd each, and one VM.
type libvirtScene struct {
	lab *lab.Lab
	vm  lab.VMConfig
	at  *lab.Host // where the VM is
}

func stageLibvirt(ctx context.Context, o options) (_ *libvirtScene, err error) {
	kernel, initrd, err := image.LinuxWithVirtio(ctx)
	if err != nil {
		return nil, err
	}
	// One vCPU, because with several a guest of TCG's may stand still after libvirt's own migration.
	vm := lab.RealVM(kernel, initrd, 256, 1, 1, "migrated.mem=64", "migrated.workers=1", "migrated.rate=500")
	vm.VCPUs, vm.Extra = 1, []string{"-device", "qemu-xhci"} // libvirt adds one, too
	l, err := lab.New(ctx)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	for _, h := range l.Hosts() {
		log, err := os.Create(filepath.Join(o.dir, "libvirt-"+h.Name+".log"))
		if err != nil {
			return nil, err
		}
		defer log.Close() // the daemons have their own
		if err := errors.Join(h.UseQEMU(ctx, o.qemu), h.MakeVMDir(), h.MakeWatchedEmulator()); err != nil {
			return nil, err
		}
		if _, err := h.StartLibvirt(ctx, log); err != nil {
			return nil, err
		}
		binaries := "/usr/bin/qemu-system-x86_64," + lab.WatchedEmulator
		if _, err := h.StartDaemon(ctx, log, "--qemu-binaries", binaries); err != nil {
			return nil, fmt.Errorf("%w; see %s", err, log.Name())
		}
	}
	return &libvirtScene{lab: l, vm: vm, at: l.A}, nil
}

// startDomain makes libvirt start the VM.
func (s *libvirtScene) startDomain(ctx context.Context) error {
	if err := s.at.StartWatchedDomain(ctx, s.vm); err != nil {
		return err
	}
	return s.ready(ctx)
}

// startPlain ends the domain, and starts the VM without libvirt.
func (s *libvirtScene) startPlain(ctx context.Context) error {
	if _, err := s.at.Virsh(ctx, "destroy", lab.DomainName); err != nil {
		return err
	}
	if _, err := s.at.StartVM(ctx, s.vm, lab.EventsArgs()...); err != nil {
		return err
	}
	return s.ready(ctx)
}

// ready waits until the VM's guest is at work.
func (s *libvirtScene) ready(ctx context.Context) error {
	var guest report.Log
	port, err := s.at.Guest(ctx, &guest)
	if err != nil {
		return err
	}
	_, err = guest.WaitReady(ctx)
	return errors.Join(err, port.Close())
}

// move moves the VM to the other host, and returns its downtime in ms by QEMU's own events.
func (s *libvirtScene) move(
	ctx context.Context, move func(ctx context.Context, from, to *lab.Host) error, events string,
) (float64, error) {
	from, to := s.at, s.lab.Other(s.at)
	watch, err := s.lab.WatchSwitchAt(ctx, from, to, events)
	if err != nil {
		return 0, err
	}
	switched, err := watch.During(ctx, func() error { return move(ctx, from, to) }, nil)
	if err != nil {
		return 0, err
	}
	s.at = to
	time.Sleep(2 * time.Second) // the guest works, and both hosts come to rest
	return ms(switched.Downtime()), nil
}

// byUs returns a function that moves the VM at an address by migrated.
func (s *libvirtScene) byUs(vm string) func(ctx context.Context, from, to *lab.Host) error {
	return func(ctx context.Context, from, to *lab.Host) error {
		_, err := from.Migrated(ctx, "migrate", "--vm", vm, "--to", to.DaemonAddr())
		return err
	}
}

// byVirsh moves the domain by libvirt's own post-copy, after one pass over its memory. It uses --unsafe because libvirt
// does not know that the hosts share the image.
func byVirsh(ctx context.Context, from, to *lab.Host) error {
	_, err := from.Virsh(ctx, "migrate", "--live", "--unsafe", "--p2p", "--postcopy", "--postcopy-after-precopy",
		lab.DomainName, to.LibvirtURI())
	return err
}
