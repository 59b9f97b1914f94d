// SPDX-License-Identifier: Apache-2.0

package evacuation

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// A fakeHost has VMs, and migrations that end as a test says. Package e2e has tests with real VMs.
type fakeHost struct {
	mu         sync.Mutex
	vms        []*migratedv1.HostVM
	unseen     error                       // why VMs fails; nil: it does not
	looking    chan struct{}               // VMs waits until it is closed; nil: it does not
	refusals   map[string]error            // by VM: why it cannot be moved
	refusedAt  map[string]map[string]error // by VM and destination
	rooms      map[string]error            // by destination: why it cannot be one
	migrations map[string]*migratedv1.Migration
	specs      map[string]*migratedv1.MigrationSpec
	order      []string // the VMs, in the order in which their migrations began
	most, now  int      // migrations at once: the most until now, and at present
	limit      uint64
	machine    *migratedv1.SourceMachine // of each VM
	checkTime  time.Duration             // what the last CheckAt was given
	// outcome returns how that attempt to move a VM ends; nil: it completes. A migration whose state is
	// MIGRATION_STATE_UNSPECIFIED does not end.
	outcome func(vm string, attempt int) *migratedv1.Migration
	started func(id string) // called when a migration has started; may be nil
}

func newFakeHost(names ...string) *fakeHost {
	p := &fakeHost{
		refusals: map[string]error{}, refusedAt: map[string]map[string]error{}, rooms: map[string]error{},
		migrations: map[string]*migratedv1.Migration{}, specs: map[string]*migratedv1.MigrationSpec{},
	}
	for i, name := range names {
		p.vms = append(p.vms, &migratedv1.HostVM{Vm: "/vm/" + name, Name: name, Pid: uint32(100 + i)})
	}
	return p
}

func (p *fakeHost) VMs(context.Context) ([]*migratedv1.HostVM, error) {
	if p.looking != nil {
		<-p.looking
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	var all []*migratedv1.HostVM
	for _, vm := range p.vms {
		all = append(all, proto.CloneOf(vm))
	}
	return all, p.unseen
}

// change changes the VMs of the host. From then on VMs fails with unseen, unless that is nil.
func (p *fakeHost) change(change func(*migratedv1.HostVM), unseen error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, vm := range p.vms {
		change(vm)
	}
	p.unseen = unseen
}

func (p *fakeHost) Check(_ context.Context, vm string) *Checked {
	p.mu.Lock()
	defer p.mu.Unlock()
	return &Checked{
		Err: p.refusals[vm], Address: vm, Name: strings.TrimPrefix(vm, "/vm/"), Size: Needs{page: 64 * mib},
		Held: Needs{page: 8 * mib}, Machine: p.machine,
	}
}

func (p *fakeHost) Room(_ context.Context, destination string) (*migratedv1.HostRoom, error) {
	return &migratedv1.HostRoom{Memory: 1000 * mib}, p.rooms[destination]
}

func (p *fakeHost) CheckAt(
	ctx context.Context, vm *Checked, destination string, _ *migratedv1.MigrationSpec,
) ([]string, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	deadline, _ := ctx.Deadline()
	p.checkTime = time.Until(deadline)
	return nil, p.refusedAt[vm.Address][destination]
}

func (p *fakeHost) Start(_ context.Context, id string, spec *migratedv1.MigrationSpec) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.migrations[id] != nil {
		return nil
	}
	p.now++
	p.most = max(p.most, p.now)
	p.order = append(p.order, spec.GetVm())
	p.specs[id] = spec
	p.migrations[id] = &migratedv1.Migration{
		Id: id, Spec: spec, State: migratedv1.MigrationState_MIGRATION_STATE_SETUP,
		Location: migratedv1.Location_LOCATION_SOURCE,
	}
	if p.started != nil {
		p.started(id)
	}
	go func() {
		time.Sleep(time.Second)
		p.end(id)
	}()
	return nil
}

func (p *fakeHost) end(id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	m := p.migrations[id]
	if m.GetState() == migratedv1.MigrationState_MIGRATION_STATE_CANCELLED {
		return
	}
	var end *migratedv1.Migration
	if p.outcome != nil {
		attempt := 0
		for other := range p.migrations {
			if p.migrations[other].GetSpec().GetVm() == m.GetSpec().GetVm() {
				attempt++
			}
		}
		end = p.outcome(strings.TrimPrefix(m.GetSpec().GetVm(), "/vm/"), attempt)
	}
	if end == nil {
		end = &migratedv1.Migration{
			State: migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, Location: migratedv1.Location_LOCATION_DESTINATION,
		}
		p.vms = slices.DeleteFunc(p.vms, func(vm *migratedv1.HostVM) bool { return vm.GetVm() == m.GetSpec().GetVm() })
	}
	if end.GetState() == migratedv1.MigrationState_MIGRATION_STATE_UNSPECIFIED {
		return
	}
	m.State, m.Location, m.Error, m.SwitchTime = end.GetState(), end.GetLocation(), end.GetError(), end.GetSwitchTime()
	p.now--
}

func (p *fakeHost) Migration(id string) (*migratedv1.Migration, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.migrations[id] == nil {
		return nil, false
	}
	return proto.CloneOf(p.migrations[id]), true
}

func (p *fakeHost) Cancel(id string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.migrations[id].State = migratedv1.MigrationState_MIGRATION_STATE_CANCELLED
	p.now--
	return nil
}

func (p *fakeHost) SetBandwidth(limit uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.limit = limit
}

func (p *fakeHost) MaxOutgoing() int { return 2 }

func open(t *testing.T, ctx context.Context, dir string, p *fakeHost) *Manager { //nolint:revive // t first
	t.Helper()
	m, err := Open(ctx, filepath.Join(dir, "evacuations"), p, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// evacuate runs an evacuation to its end.
func evacuate(t *testing.T, p *fakeHost, spec *migratedv1.EvacuationSpec) *migratedv1.Evacuation {
	t.Helper()
	dir := t.TempDir()
	var view *migratedv1.Evacuation
	synctest.Test(t, func(t *testing.T) {
		m := open(t, t.Context(), dir, p)
		if _, err := m.Begin("e", spec); err != nil {
			t.Fatal(err)
		}
		m.Wait()
		view, _, _ = m.Snapshot("e")
	})
	return view
}

func states(view *migratedv1.Evacuation) string {
	var all []string
	for _, vm := range view.GetVms() {
		all = append(all, fmt.Sprintf("%s %s %s", vm.GetName(),
			strings.ToLower(strings.TrimPrefix(vm.GetState().String(), "EVACUATED_VM_STATE_")), vm.GetDestination()))
	}
	slices.Sort(all)
	return strings.Join(all, ", ")
}

func want(t *testing.T, view *migratedv1.Evacuation, state migratedv1.EvacuationState, vms string) {
	t.Helper()
	if view.GetState() != state || states(view) != vms {
		t.Errorf("%v: %s\nwant %v: %s\n%v", view.GetState(), states(view), state, vms, view)
	}
}

var to = &migratedv1.EvacuationSpec{Destinations: []string{"b:1", "c:1"}}

func with(change func(*migratedv1.EvacuationSpec)) *migratedv1.EvacuationSpec {
	spec := proto.CloneOf(to)
	change(spec)
	return spec
}
