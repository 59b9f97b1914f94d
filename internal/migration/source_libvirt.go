// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"

	"github.com/migrated-vm/migrated/internal/libvirt"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// noteDefined notes what the destination said of the domain's definition there, durably: a daemon that is restarted may
// have to undefine the domain here.
func (s *Source) noteDefined(answer *migratedv1.WatchIncomingResponse) {
	if answer.Defined == nil || !s.cfg.Spec.GetUndefineSource() {
		return
	}
	if s.definedThere != nil && *s.definedThere == answer.GetDefined() {
		return // it says so with all of its figures
	}
	s.definedThere = answer.Defined
	if err := s.cfg.Records.noteDefined(s.cfg.ID, answer.GetDefined()); err != nil {
		s.log.Warn("cannot record that the domain is defined at the destination", "error", err)
	}
}

// undefine has libvirt forget the source's domain, if the operator asked for that, unless the definition has to stay:
// see whyDefined. If it stays, the migration shows why. ended is the reason of a VM that ended by itself. qemuEnded
// reports whether the domain's QEMU has ended: what libvirt has by that name then is not this VM.
func (s *Source) undefine(ended migratedv1.Reason, qemuEnded func() bool) {
	if !s.undefines() {
		return
	}
	do := (*libvirt.Domain).Undefine
	if why := s.whyDefined(ended); why != nil {
		do = staysDefined(why)
	}
	s.showDefinition(withRun(s.cfg.Spec.GetVm(), qemuEnded, do))
}

// keepDefinition shows why the definition stays at the source, if the operator asked for the opposite.
func (s *Source) keepDefinition(why error) {
	if s.undefines() {
		anyRun := func() bool { return false } // the definition is that of all runs, and nothing is changed
		s.showDefinition(withRun(s.cfg.Spec.GetVm(), anyRun, staysDefined(why)))
	}
}

// undefines reports whether the VM is a domain of libvirt's that the operator wants to be undefined here.
func (s *Source) undefines() bool {
	return libvirt.IsAddress(s.cfg.Spec.GetVm()) && s.cfg.Spec.GetUndefineSource()
}

// refuseUndefine refuses a migration that is to remove a definition with which libvirt would lose snapshots.
func (s *Source) refuseUndefine(ctx context.Context) error {
	if !s.undefines() {
		return nil
	}
	keeps, err := s.vm.DomainKeeps(ctx)
	if err != nil {
		return err
	}
	if keeps.Snapshots+keeps.Checkpoints == 0 {
		return nil
	}
	return withReason(withRemedy(
		fmt.Errorf("libvirt here would lose the domain's %d snapshots and %d checkpoints with its definition",
			keeps.Snapshots, keeps.Checkpoints),
		"leave out --undefine-source, or remove what libvirt knows of them: "+
			"virsh snapshot-delete --metadata, virsh checkpoint-delete --metadata"),
		migratedv1.Reason_REASON_VM_REFUSED)
}

// staysDefined returns a function that returns why if the domain is defined.
func staysDefined(why error) func(*libvirt.Domain, context.Context) error {
	return func(d *libvirt.Domain, ctx context.Context) error {
		if defined, err := d.IsDefined(ctx); err != nil || !defined {
			return err
		}
		return why
	}
}

// showDefinition shows that the definition stays at the source, because of err. nil: it does not.
func (s *Source) showDefinition(err error) {
	if err == nil || errors.Is(err, libvirt.ErrNoDomain) { // the domain was transient, and has ended
		return
	}
	remedy := "if nobody uses the domain here, and it is defined on the destination (virsh list --all --persistent), " +
		"run here: virsh undefine " + libvirt.NameIn(s.cfg.Spec.GetVm())
	s.log.Warn("the domain's definition stays at the source", "reason", err, "remedy", remedy)
	s.update(func(m *migratedv1.Migration) { m.Definition = fmt.Sprintf("stays at the source: %v; %s", err, remedy) })
}

// whyDefined returns why the domain stays defined at the source although the operator asked for the opposite; nil: it
// does not. It may be the only definition: it goes only if the migration completed, and, if the operator wanted the
// domain to be defined at the destination, only if the destination has said that it is.
func (s *Source) whyDefined(ended migratedv1.Reason) error {
	switch {
	case ended != migratedv1.Reason_REASON_UNSPECIFIED:
		return errors.New("the VM ended on the destination before the migration had completed")
	case !s.cfg.Spec.GetPersistent():
		return nil
	case s.definedThere == nil:
		return errors.New("the destination has not said that the domain is defined there; " +
			"daemons of earlier versions do not")
	case !*s.definedThere:
		return errors.New("the destination could not define the domain; its daemon's log says why")
	default:
		return nil
	}
}
