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
	"github.com/migrated-vm/migrated/internal/qemu/launch"
)

// openDomain has this host's libvirt start a domain from the source's definition.
func (d *Destination) openDomain(ctx context.Context, definition string) error {
	if d.cfg.Request.GetDestinationTemplate() != "" {
		return withRemedy(errors.New("a template is for QEMU's command line, but libvirt makes that of this VM"),
			"leave out --template")
	}
	if len(d.cfg.Binaries) == 0 {
		return withRemedy(cmdline.ErrNoBinaries, "set qemu_binaries in the destination's configuration")
	}
	machine := d.cfg.Request.GetMachine()
	if err := checkPromise(machine, availableMemory); err != nil {
		return err
	}
	limit := libvirt.Limit{
		Name:   machine.GetName(),
		MayRun: func(binary string) error { return cmdline.MayRun(binary, d.cfg.Binaries) },
		Root:   d.cfg.MinUID == 0,
	}
	if err := limit.Check(definition); err != nil {
		return withRemedy(fmt.Errorf("the destination starts no such domain: %w", err),
			"take that out of the domain's definition, or give another with --xml, or move it with virsh migrate")
	}
	name := machine.GetName()
	definition, err := d.cfg.Starter.Hook(name, definition) // unchecked: the hook is this host's
	if err != nil {
		return err
	}
	if err := checkSockets(definition); err != nil {
		return withRemedy(fmt.Errorf("the destination starts no such domain: %w", err),
			"see what uses that path; or give the domain another path with --xml or with the destination's libvirt hook")
	}
	d.log.Info("having libvirt start the domain", "name", name)
	started, err := libvirt.Start(ctx, d.cfg.LibvirtSocket, definition)
	if errors.Is(err, libvirt.ErrActive) || errors.Is(err, libvirt.ErrNoAnswer) {
		// If a daemon is killed while libvirt starts the domain, or libvirt does not answer, the domain stays and the
		// next daemon does not know of it.
		return withRemedy(err, fmt.Sprintf("run on the destination: virsh domstate --reason %[1]s; "+
			"if it is still paused for a migration that is over, end it: virsh destroy %[1]s", name))
	} else if err != nil {
		return thisHost.explainFailedStart(err, machine)
	}
	d.domain = started.Address()
	if err := d.attachStarted(ctx, started); err != nil {
		return err
	}
	if err := checkIncoming(ctx, d.vm); err != nil {
		return err
	}
	d.claim, err = qemuClaims.claimVM(d.vm, d.cfg.Request.GetId())
	return err
}

// checkSockets refuses a definition whose QEMU would take the place of another process' socket, or of a file.
func checkSockets(definition string) error {
	paths, err := libvirt.Sockets(definition)
	for _, path := range paths {
		err = errors.Join(err, launch.CheckUnused(path))
	}
	return err
}

// attachStarted attaches to a domain that libvirt has just started, and closes started. If that fails, it ends the
// domain.
func (d *Destination) attachStarted(ctx context.Context, started *libvirt.Domain) (err error) {
	if d.vm, err = qemu.Attach(ctx, d.domain); err != nil {
		err = fmt.Errorf("attach to the domain that libvirt has started: %w", err)
		ctx, cancel := context.WithTimeout(context.Background(), libvirtTimeout)
		defer cancel()
		err = errors.Join(err, started.Destroy(ctx))
	}
	if closeErr := started.Close(); closeErr != nil { // the domain is as it is
		d.log.Warn("cannot disconnect from libvirt", "error", closeErr)
	}
	return err
}

// libvirtTimeout bounds each operation that libvirt does when a migration is over.
const libvirtTimeout = 10 * time.Second

// mustPersist says whether libvirt has yet to keep the domain's definition, as the source asked for.
func (d *Destination) mustPersist() bool {
	return d.domain != "" && d.cfg.Request.GetSpec().GetPersistent() && !d.defined.Load()
}

// persist has libvirt keep the domain's definition, if the source asked for that. It is called before the migration is
// shown as completed: the source then removes its own definition, but not where this one failed. The VM runs, and a
// failure does not change that. The caller holds mu, or no other goroutine has a VM to set.
func (d *Destination) persist() {
	if !d.mustPersist() {
		return
	}
	if err := withRun(d.domain, d.qemuEnded, (*libvirt.Domain).Persist); err != nil {
		d.log.Error("cannot confirm that libvirt defined the domain here", "error", err,
			"remedy", "if it runs here, define it: virsh dumpxml --migratable, then virsh define; "+
				"the source keeps its definition")
		return
	}
	d.defined.Store(true)
	d.kept.header().defined.Store(1)
}

// Defined says whether this host's libvirt keeps the domain's definition; nil: the source did not ask for that. It is
// decided when the migration is shown as completed.
func (d *Destination) Defined() *bool {
	if !d.cfg.Request.GetSpec().GetPersistent() {
		return nil
	}
	defined := d.defined.Load()
	return &defined
}

// qemuEnded says whether the QEMU of the VM has ended. The caller holds mu.
func (d *Destination) qemuEnded() bool {
	if d.vm != nil {
		return d.vm.Ended()
	}
	return !d.left.Alive()
}

// withRun opens the domain of a QEMU and calls do with it, within libvirtTimeout. ended says whether that QEMU has
// ended. libvirt finds the domain by its name or UUID, and that may be a later run of it, which is another VM. If QEMU
// is alive after libvirt has found the domain, the domain is that QEMU's, and do reaches no other run
// (libvirt.ErrOtherRun).
func withRun(vm string, ended func() bool, do func(*libvirt.Domain, context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), libvirtTimeout)
	defer cancel()
	domain, err := libvirt.Open(ctx, vm)
	if err != nil {
		return err
	}
	if ended() {
		err = libvirt.ErrOtherRun
	} else {
		err = do(domain, ctx)
	}
	return errors.Join(err, domain.Close())
}
