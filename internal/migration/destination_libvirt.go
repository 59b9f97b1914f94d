// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"

	"github.com/migrated-vm/migrated/internal/libvirt"
	"github.com/migrated-vm/migrated/internal/qemu"
)

// openDomain has this host's libvirt start a domain like the source's.
func (d *Destination) openDomain(ctx context.Context, definition string) error {
	if d.cfg.Request.GetDestinationTemplate() != "" {
		return withRemedy(errors.New("a template is of QEMU's command line, and this VM's is libvirt's"),
			"leave out --template")
	}
	machine := d.cfg.Request.GetMachine()
	if err := checkPromise(machine, availableMemory); err != nil {
		return err
	}
	limit := libvirt.Limit{
		MayRun: func(binary string) error { return qemu.MayRun(binary, d.cfg.Binaries) },
		Root:   d.cfg.MinUID == 0,
	}
	if err := limit.Check(definition); err != nil {
		return withRemedy(fmt.Errorf("the destination starts no such domain: %w", err),
			"take that out of the domain's definition, or move it with virsh migrate")
	}
	d.log.Info("having libvirt start the domain", "name", machine.GetName())
	var err error
	if d.domain, err = libvirt.Start(ctx, definition); err != nil {
		return thisHost.explainStart(err, machine)
	}
	if d.vm, err = qemu.Attach(ctx, d.domain); err != nil {
		return errors.Join(fmt.Errorf("attach to the domain that libvirt has started: %w", err), libvirt.End(ctx, d.domain))
	}
	if err := checkIncoming(ctx, d.vm); err != nil {
		return err
	}
	d.claim, err = claimed.takeVM(d.vm, d.cfg.Request.GetId())
	return err
}

// persist has libvirt keep the domain's definition, where that was asked for. The VM runs: a failure changes nothing
// about that.
func (d *Destination) persist() {
	domain := d.vm.Domain()
	if domain == nil || !d.cfg.Request.GetSpec().GetPersistent() {
		return
	}
	if err := domain.Persist(); err != nil {
		d.log.Error("the domain runs, and is not defined at the destination", "error", err)
	}
}

// undefine has libvirt forget the source's domain, where that was asked for.
func (s *Source) undefine() {
	domain := s.vm.Domain()
	if domain == nil || !s.cfg.Spec.GetUndefineSource() {
		return
	}
	if err := domain.Undefine(); err != nil {
		s.log.Error("the domain's definition stays at the source", "error", err)
	}
}
