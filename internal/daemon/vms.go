// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/migrated-vm/migrated/internal/evacuation"
	"github.com/migrated-vm/migrated/internal/libvirt"
	"github.com/migrated-vm/migrated/internal/migration"
	"github.com/migrated-vm/migrated/internal/printable"
	"github.com/migrated-vm/migrated/internal/qemu/process"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// vms returns the VMs that run on this host: its QEMUs, with libvirt's names for those of libvirt.
func (d *Daemon) vms(ctx context.Context) ([]*migratedv1.HostVM, error) {
	processes, err := process.Find()
	if err != nil {
		return nil, err
	}
	domains, err := libvirt.Domains(ctx, d.cfg.LibvirtSocket)
	if err != nil && !errors.Is(err, libvirt.ErrNoLibvirt) {
		return nil, fmt.Errorf("ask libvirt for its domains: %w", err)
	}
	var found []*migratedv1.HostVM
	for _, p := range processes {
		vm := &migratedv1.HostVM{
			Name: p.Name, Uuid: p.UUID, Pid: uint32(p.PID), Elsewhere: p.Elsewhere, Migration: migration.ClaimOf(p.PID),
		}
		i := slices.IndexFunc(domains, func(one libvirt.Running) bool { return strings.EqualFold(one.UUID, p.UUID) })
		switch {
		case i >= 0 && !p.Elsewhere:
			vm.Name = domains[i].Name
			vm.Vm = libvirt.Address(d.cfg.LibvirtSocket, vm.Name)
			domains = slices.Delete(domains, i, i+1)
		case len(p.Sockets) > 0:
			vm.Vm = p.Sockets[0]
		default:
			vm.Problem = "no QMP socket on QEMU's command line is reachable from here; " +
				"start the VM with -qmp unix:PATH,server=on,wait=off"
		}
		if err := d.lookHandedOver(ctx, vm); err != nil {
			return nil, err
		}
		printable.Valid(vm) // it has parts of a command line, which may not be UTF-8
		found = append(found, vm)
	}
	for _, one := range domains {
		found = append(found, &migratedv1.HostVM{
			Vm: libvirt.Address(d.cfg.LibvirtSocket, one.Name), Name: one.Name, Uuid: one.UUID,
		})
	}
	slices.SortFunc(found, func(a, b *migratedv1.HostVM) int {
		return cmp.Or(cmp.Compare(a.GetName(), b.GetName()), cmp.Compare(a.GetPid(), b.GetPid()))
	})
	return found, nil
}

// lookHandedOver sets what is known of a VM that a migration has handed over.
func (d *Daemon) lookHandedOver(ctx context.Context, vm *migratedv1.HostVM) error {
	if vm.GetMigration() != "" { // that migration has QEMU's monitor
		_, handedOver, err := d.records.ForVM(int(vm.GetPid()))
		vm.HandedOver = handedOver
		return err
	}
	away, problem, err := d.records.MovedAway(ctx, int(vm.GetPid()))
	vm.HandedOver = away
	if problem != nil {
		vm.Problem = problem.Error() + ": " + migration.Remedy(problem)
	}
	return err
}

// evacuatedHost implements evacuation.Host.
type evacuatedHost struct{ d *Daemon }

// VMs leaves out QEMUs that are kept only for their memory, because their VMs were moved to other hosts.
func (h evacuatedHost) VMs(ctx context.Context) ([]*migratedv1.HostVM, error) {
	found, err := h.d.vms(ctx)
	return slices.DeleteFunc(found, func(vm *migratedv1.HostVM) bool {
		return vm.GetHandedOver() && vm.GetMigration() == ""
	}), err
}

func (h evacuatedHost) Check(ctx context.Context, vm string) *evacuation.Checked {
	if id := h.d.migrations.underWay(vm); id != "" {
		return &evacuation.Checked{Err: underWayError(id)}
	}
	cfg := h.d.sourceConfig()
	cfg.Spec = &migratedv1.MigrationSpec{Vm: vm}
	results, machine := migration.CheckSource(ctx, cfg)
	warnings, err := split(shown(results, migratedv1.MigrationRole_MIGRATION_ROLE_SOURCE))
	size, held := migration.MemoryOf(machine)
	return &evacuation.Checked{
		Err: err, Address: vm, Name: machine.GetName(), Warnings: warnings, Size: size, Held: held, Machine: machine,
	}
}

// split returns the warnings among the results of a check, and the first failure as an error.
func split(results []*migratedv1.CheckResult) (warnings []string, err error) {
	for _, r := range results {
		text := r.GetSubject() + ": " + r.GetDetail()
		switch {
		case r.GetStatus() == migratedv1.CheckStatus_CHECK_STATUS_WARNING:
			warnings = append(warnings, text)
		case r.GetStatus() == migratedv1.CheckStatus_CHECK_STATUS_FAILED && err == nil:
			err = errors.New(text)
			if r.GetRemedy() != "" {
				err = migration.WithRemedy(err, r.GetRemedy())
			}
		}
	}
	return warnings, err
}

func (h evacuatedHost) Room(ctx context.Context, destination string) (*migratedv1.HostRoom, error) {
	conn, err := h.d.dial(destination)
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close() }() // only the answer is needed
	answer, err := migratedv1.NewPeerServiceClient(conn).CheckHost(ctx, &migratedv1.CheckHostRequest{})
	if err != nil {
		return nil, migration.FromPeer("ask how much memory it has left", destination, err)
	}
	_, err = split(answer.GetResults())
	return answer.GetRoom(), err
}

func (h evacuatedHost) CheckAt(
	ctx context.Context, vm *evacuation.Checked, destination string, spec *migratedv1.MigrationSpec,
) (warnings []string, err error) {
	results := h.d.checkDestination(ctx, &migratedv1.CheckRequest{
		Destination: destination, RequireSecure: spec.GetRequireSecure(), DestinationTemplate: spec.GetDestinationTemplate(),
	}, vm.Machine)
	h.d.checked.add(vm.Address, destination, results)
	return split(results)
}

func (h evacuatedHost) Start(ctx context.Context, id string, spec *migratedv1.MigrationSpec) error {
	_, err := (&controlService{daemon: h.d}).Start(ctx, &migratedv1.StartRequest{Id: id, Spec: spec})
	return migration.FromStatus(err)
}

func (h evacuatedHost) Migration(id string) (view *migratedv1.Migration, over bool) {
	if t := h.d.migrations.findAs(id, migratedv1.MigrationRole_MIGRATION_ROLE_SOURCE); t != nil {
		view, _ = t.Snapshot()
		return view, isDone(t)
	}
	if l := h.d.migrations.leftover(id); l != nil {
		view, _ = l.Snapshot()
		return view, true // its location is unknown
	}
	if r := h.d.reports.Load(id, migratedv1.MigrationRole_MIGRATION_ROLE_SOURCE); r != nil {
		return r.GetMigration(), true
	}
	return nil, false
}

func (h evacuatedHost) Cancel(id string) error {
	if s := h.d.migrations.source(id); s != nil {
		return s.Cancel()
	}
	return nil
}

func (h evacuatedHost) SetBandwidth(bytesPerSecond uint64) {
	h.d.evacuated.Store(bytesPerSecond)
	h.d.limitHost()
}

func (h evacuatedHost) MaxOutgoing() int { return h.d.cfg.MaxOutgoing }
