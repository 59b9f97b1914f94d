// SPDX-License-Identifier: Apache-2.0

package evacuation

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/migrated-vm/migrated/internal/migration"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

const (
	// checksAtOnce is how many VMs are checked at a time. A destination starts a QEMU for each check.
	checksAtOnce = 4
	// findTime, checkTime and roomTime bound the calls that make a plan. Those that start a QEMU may take longer.
	findTime  = 30 * time.Second
	checkTime = 2 * time.Minute
	roomTime  = 20 * time.Second
)

// errNotFound says that no VM has a name in the specification.
var errNotFound = errors.New("no VM of that name or address runs on this host")

// plan finds the VMs and sets for each a destination, or an error that says why it has none. An error of plan
// itself says that there is no plan.
func (e *evacuation) plan(ctx context.Context) error {
	found, err := e.find(ctx)
	if err != nil {
		return err
	}
	p, warnings, err := e.askDestinations(ctx)
	if err != nil {
		return err
	}
	for _, group := range e.spec.GetApart() {
		p.keepApart(addresses(found, group.GetVms()))
	}
	e.update(func(view *migratedv1.Evacuation) {
		view.Warnings, view.Vms = warnings, nil
		for _, vm := range found {
			if vm.GetElsewhere() {
				view.Elsewhere++
				continue
			}
			view.Vms = append(view.Vms, &migratedv1.EvacuatedVM{
				Vm: vm.GetVm(), Name: vm.GetName(), Pid: vm.GetPid(), State: migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_WAITING,
				Location: migratedv1.Location_LOCATION_SOURCE,
			})
		}
	})
	return e.checkAll(ctx, p, found)
}

// find returns the VMs that are to be moved. It refuses a specification with a name that no VM has.
func (e *evacuation) find(ctx context.Context) ([]*migratedv1.HostVM, error) {
	all, err := e.allVMs(ctx)
	if err != nil {
		return nil, fmt.Errorf("look for the VMs of this host: %w", err)
	}
	if err := e.checkNames(all); err != nil {
		return nil, migration.WithRemedy(err, "see which VMs there are with 'migrated vms'")
	}
	return slices.DeleteFunc(all, func(vm *migratedv1.HostVM) bool {
		wanted := len(e.spec.GetVms()) == 0 ||
			slices.ContainsFunc(e.spec.GetVms(), func(name string) bool { return isNamed(vm, name) })
		stays := slices.ContainsFunc(e.spec.GetExcept(), func(name string) bool { return isNamed(vm, name) })
		return !wanted || stays
	}), nil
}

// checkNames refuses a name in the specification that no VM has, or that two have: the wrong VM might be moved.
func (e *evacuation) checkNames(all []*migratedv1.HostVM) error {
	names := slices.Concat(e.spec.GetVms(), e.spec.GetExcept())
	for name := range e.spec.GetWeights() {
		names = append(names, name)
	}
	for _, group := range e.spec.GetApart() {
		names = append(names, group.GetVms()...)
	}
	for _, name := range names {
		switch n := len(addresses(all, []string{name})); n {
		case 1:
		case 0:
			return fmt.Errorf("%q: %w", name, errNotFound)
		default:
			return fmt.Errorf("%q is the name of %d VMs: give the address of the one that is meant", name, n)
		}
	}
	return nil
}

// isNamed says whether name is the name or the address of a VM.
func isNamed(vm *migratedv1.HostVM, name string) bool {
	return name == vm.GetName() || name == vm.GetVm()
}

// key returns the key of a VM in an evacuation: its address, or its process if it has none. It is unique on a host.
func key(vm string, pid uint32) string {
	if vm == "" {
		return fmt.Sprintf("process %d", pid)
	}
	return vm
}

// addresses returns the keys of the VMs that have one of these names or addresses.
func addresses(all []*migratedv1.HostVM, names []string) (keys []string) {
	for _, vm := range all {
		if slices.ContainsFunc(names, func(name string) bool { return isNamed(vm, name) }) {
			keys = append(keys, key(vm.GetVm(), vm.GetPid()))
		}
	}
	return keys
}

// askDestinations asks each destination how much memory it has left. Those that do not answer, or cannot be
// destinations, are left out, with a warning.
func (e *evacuation) askDestinations(ctx context.Context) (p *placer, warnings []string, err error) {
	p = newPlacer(uint64(os.Getpagesize()))
	problems := []error{errors.New("no destination can take VMs of this host")}
	rooms := make([]*migratedv1.HostRoom, len(e.spec.GetDestinations()))
	failures := make([]error, len(rooms))
	var asking errgroup.Group
	for i, address := range e.spec.GetDestinations() {
		asking.Go(func() error {
			ctx, cancel := context.WithTimeout(ctx, roomTime)
			defer cancel()
			rooms[i], failures[i] = e.host.Room(ctx, address)
			return nil
		})
	}
	_ = asking.Wait() // its errors are in failures
	for i, address := range e.spec.GetDestinations() {
		if failures[i] != nil {
			problems = append(problems, fmt.Errorf("%s: %w", address, failures[i]))
			warnings = append(warnings, fmt.Sprintf("%s is left out: %v", address, failures[i]))
			continue
		}
		p.addHost(address, rooms[i])
	}
	if len(p.hosts) == 0 {
		return nil, nil, migration.WithRemedy(errors.Join(problems...),
			"see what each lacks with 'migrated check --to HOST'")
	}
	return p, warnings, nil
}

// checkAll checks each VM on this host, chooses destinations, for the largest VMs first, and has the destinations check
// the VMs.
func (e *evacuation) checkAll(ctx context.Context, p *placer, found []*migratedv1.HostVM) error {
	found = slices.DeleteFunc(found, (*migratedv1.HostVM).GetElsewhere)
	checked := make([]*Checked, len(found))
	var looking errgroup.Group
	looking.SetLimit(checksAtOnce)
	for i, vm := range found {
		looking.Go(func() error {
			ctx, cancel := context.WithTimeout(ctx, checkTime)
			defer cancel()
			checked[i] = e.checkHere(ctx, vm)
			return nil
		})
	}
	_ = looking.Wait() // the results are in checked
	order := make([]int, len(found))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(checked[b].Size.sum(), checked[a].Size.sum()) })
	// All VMs have destinations before the first destination is asked, so that the same VMs get the same plan.
	places := make([]placement, len(found))
	for _, i := range order {
		if places[i].err = checked[i].Err; places[i].err == nil {
			places[i].host, places[i].err = p.place(key(found[i].GetVm(), found[i].GetPid()), e.needs(checked[i]), avoidNone)
		}
	}
	var asking errgroup.Group
	asking.SetLimit(checksAtOnce)
	for _, i := range order {
		asking.Go(func() error {
			e.checkThere(ctx, p, found[i], checked[i], places[i])
			return nil
		})
	}
	_ = asking.Wait() // each VM has its state
	e.update(func(view *migratedv1.Evacuation) {
		slices.SortStableFunc(view.Vms, func(a, b *migratedv1.EvacuatedVM) int {
			return cmp.Compare(b.GetBytes(), a.GetBytes())
		})
	})
	e.placer = p
	return context.Cause(ctx)
}

// checkHere checks a VM on this host.
func (e *evacuation) checkHere(ctx context.Context, vm *migratedv1.HostVM) *Checked {
	switch {
	case vm.GetMigration() != "":
		return &Checked{Err: migration.WithRemedy(fmt.Errorf("migration %s is under way with it", vm.GetMigration()),
			"wait until that is over, and evacuate again")}
	case vm.GetVm() == "":
		return &Checked{Err: errors.New(vm.GetProblem())}
	} // else the check says what problem it has, and what to do
	return e.host.Check(ctx, vm.GetVm())
}

// A placement is a result of placer.place.
type placement struct {
	host string
	err  error
}

// avoidNone allows all hosts.
func avoidNone(string) error { return nil }

// checkThere asks the destination that was chosen for a VM whether it can have the VM, and then others, until one can.
func (e *evacuation) checkThere(ctx context.Context, p *placer, vm *migratedv1.HostVM, c *Checked, chosen placement) {
	name, refused := key(vm.GetVm(), vm.GetPid()), make(map[string]error)
	e.updateVM(name, func(v *migratedv1.EvacuatedVM) {
		v.Bytes, v.BytesHeld, v.Warnings = c.Size.sum(), c.Held.sum(), c.Warnings
		for _, size := range slices.Sorted(maps.Keys(c.Size)) {
			v.Memory = append(v.Memory, &migratedv1.PageMemory{PageSize: size, Bytes: c.Size[size], BytesHeld: c.Held[size]})
		}
		if c.Name != "" {
			v.Name = c.Name
		}
	})
	for chosen.err == nil {
		ctx, cancel := context.WithTimeout(ctx, max(checkTime, migration.CheckTime(c.Machine)))
		warnings, refusal := e.host.CheckAt(ctx, c, chosen.host, e.spec.GetMigration())
		cancel()
		if refusal == nil {
			e.updateVM(name, func(v *migratedv1.EvacuatedVM) {
				v.Destination = chosen.host
				v.Warnings = append(v.Warnings, warnings...)
			})
			return
		}
		p.remove(name, e.needs(c))
		refused[chosen.host] = refusal
		chosen.host, chosen.err = p.place(name, e.needs(c), func(host string) error { return refused[host] })
	}
	if all := slices.Collect(maps.Values(refused)); len(all) == 1 && len(p.hosts) == 1 {
		chosen.err = all[0] // which has a remedy
	}
	e.updateVM(name, func(v *migratedv1.EvacuatedVM) {
		v.State, v.Error = migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_CANNOT_MOVE, migration.Describe(chosen.err)
	})
}

// needs returns how much of a destination's memory a VM takes.
func (e *evacuation) needs(c *Checked) Needs {
	if e.spec.GetOvercommit() {
		return c.Held
	}
	return c.Size
}
