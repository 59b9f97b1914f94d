// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/migrated-vm/migrated/internal/libvirt"
	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/cmdline"
)

// openDomain has this host's libvirt start a domain from the source's definition.
func (d *Destination) openDomain(ctx context.Context, definition string) error {
	if d.cfg.Request.GetDestinationTemplate() != "" {
		return withRemedy(errors.New("a template is of QEMU's command line, and this VM's is libvirt's"),
			"leave out --template")
	}
	machine := d.cfg.Request.GetMachine()
	if err := checkPromise(machine, availableMemory); err != nil {
		return err
	}
	name, err := libvirt.NameOf(definition)
	if err != nil {
		return err
	}
	limit := libvirt.Limit{
		MayRun: func(binary string) error { return cmdline.MayRun(binary, d.cfg.Binaries) },
		Root:   d.cfg.MinUID == 0,
	}
	if err := limit.Check(definition); err != nil {
		return withRemedy(fmt.Errorf("the destination starts no such domain: %w", err),
			"take that out of the domain's definition, or move it with virsh migrate")
	}
	if definition, err = d.cfg.Starter.Hook(name, definition); err != nil { // unchecked: the hook is this host's
		return err
	}
	d.log.Info("having libvirt start the domain", "name", name)
	if d.domain, err = libvirt.Start(ctx, d.cfg.LibvirtSocket, definition); errors.Is(err, libvirt.ErrActive) {
		// If a daemon is killed while libvirt starts the domain, the domain stays and the next daemon does not know
		// of it.
		return withRemedy(err, fmt.Sprintf("look at it on the destination: virsh domstate --reason %[1]s; "+
			"if it is paused since a migration that is over, end it there: virsh destroy %[1]s", name))
	} else if err != nil {
		return thisHost.explainFailedStart(err, machine)
	}
	if d.vm, err = qemu.Attach(ctx, d.domain); err != nil {
		return errors.Join(fmt.Errorf("attach to the domain that libvirt has started: %w", err),
			withLibvirt(d.domain, (*libvirt.Domain).Destroy))
	}
	if err := checkIncoming(ctx, d.vm); err != nil {
		return err
	}
	d.claim, err = qemuClaims.claimVM(d.vm, d.cfg.Request.GetId())
	return err
}

// libvirtTimeout bounds each operation that libvirt does when a migration is over.
const libvirtTimeout = 10 * time.Second

// persist has libvirt keep the domain's definition, if the source asked for that. The VM runs, and a failure does not
// change that. The caller holds mu.
func (d *Destination) persist() {
	if d.domain == "" || !d.cfg.Request.GetSpec().GetPersistent() {
		return
	}
	if err := withLibvirt(d.domain, (*libvirt.Domain).Persist); err != nil {
		d.log.Error("the domain runs, and is not known to be defined at the destination", "error", err)
	}
}

// undefine has libvirt forget the source's domain, if the operator asked for that.
func (s *Source) undefine() {
	if vm := s.cfg.Spec.GetVm(); libvirt.IsAddress(vm) && s.cfg.Spec.GetUndefineSource() {
		if err := withLibvirt(vm, (*libvirt.Domain).Undefine); err != nil {
			s.log.Error("the domain's definition stays at the source", "error", err)
		}
	}
}

// withLibvirt opens a domain and calls do with it, within libvirtTimeout.
func withLibvirt(vm string, do func(*libvirt.Domain, context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), libvirtTimeout)
	defer cancel()
	domain, err := libvirt.Open(ctx, vm)
	if err != nil {
		return err
	}
	return errors.Join(do(domain, ctx), domain.Close())
}
