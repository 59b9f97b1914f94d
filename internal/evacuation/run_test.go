// SPDX-License-Identifier: Apache-2.0

package evacuation

import (
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

func TestAllMove(t *testing.T) {
	p := newFakeHost("a", "b", "c", "d", "e")
	view := evacuate(t, p, with(func(s *migratedv1.EvacuationSpec) {
		s.Weights = map[string]uint32{"d": 7}
		s.Migration = &migratedv1.MigrationSpec{Persistent: true}
	}))
	want(t, view, migratedv1.EvacuationState_EVACUATION_STATE_DONE,
		"a moved b:1, b moved c:1, c moved b:1, d moved c:1, e moved b:1")
	if p.most != 2 {
		t.Errorf("%d at once, where max_outgoing is 2", p.most)
	}
	for _, spec := range p.specs {
		if (spec.GetWeight() == 7) != (spec.GetVm() == "/vm/d") || !spec.GetPersistent() ||
			spec.GetLabels()[Label] != "e" {
			t.Errorf("begun with %v", spec)
		}
	}
}

// TestGoesOnAfterFailures: the failure of one migration does not affect others. A VM that is still here is tried again,
// with another destination.
func TestGoesOnAfterFailures(t *testing.T) {
	p := newFakeHost("refused", "nowhere", "elsewhere", "unlucky", "interrupted", "busy", "interfered",
		"hopeless", "ended", "lost", "queued", "twice", "resurrected", "fine")
	p.refusals["/vm/refused"] = errors.New("it has a device that cannot be moved")
	p.refusedAt["/vm/nowhere"] = map[string]error{"b:1": errors.New("no such CPU"), "c:1": errors.New("no such disk")}
	p.refusedAt["/vm/elsewhere"] = map[string]error{"b:1": errors.New("no such CPU")}
	failed := func(location migratedv1.Location, reason migratedv1.Reason) *migratedv1.Migration {
		return &migratedv1.Migration{
			State: migratedv1.MigrationState_MIGRATION_STATE_FAILED, Location: location,
			Error: &migratedv1.MigrationError{Message: "it failed", Reason: reason},
		}
	}
	p.outcome = func(vm string, attempt int) *migratedv1.Migration {
		switch {
		case vm == "unlucky" && attempt == 1:
			return failed(migratedv1.Location_LOCATION_SOURCE, migratedv1.Reason_REASON_UNREACHABLE)
		case vm == "interrupted" && attempt == 1: // by the end of its daemon, while its destination loads the state
			return failed(migratedv1.Location_LOCATION_SOURCE, migratedv1.Reason_REASON_PAGES_UNREACHABLE)
		case vm == "busy" && attempt < mostAttempts:
			return failed(migratedv1.Location_LOCATION_SOURCE, migratedv1.Reason_REASON_UNSPECIFIED)
		case vm == "interfered":
			return failed(migratedv1.Location_LOCATION_SOURCE, migratedv1.Reason_REASON_INTERFERED)
		case vm == "hopeless":
			return failed(migratedv1.Location_LOCATION_SOURCE, migratedv1.Reason_REASON_LOAD_FAILED)
		case vm == "lost":
			end := failed(migratedv1.Location_LOCATION_UNKNOWN, migratedv1.Reason_REASON_UNREACHABLE)
			end.SwitchTime = timestamppb.Now()
			return end
		case vm == "queued" && attempt == 1: // it had not looked at the VM yet
			return failed(migratedv1.Location_LOCATION_UNKNOWN, migratedv1.Reason_REASON_NO_TURN)
		case vm == "twice": // somebody continued it here
			end := failed(migratedv1.Location_LOCATION_DESTINATION, migratedv1.Reason_REASON_INTERFERED)
			end.State = migratedv1.MigrationState_MIGRATION_STATE_COMPLETED
			return end
		case vm == "resurrected": // somebody continued it here, after it had ended there
			return &migratedv1.Migration{
				State: migratedv1.MigrationState_MIGRATION_STATE_ENDED, Location: migratedv1.Location_LOCATION_SOURCE,
			}
		case vm == "ended":
			return &migratedv1.Migration{
				State: migratedv1.MigrationState_MIGRATION_STATE_ENDED, Location: migratedv1.Location_LOCATION_ENDED,
			}
		}
		return nil
	}
	view := evacuate(t, p, to)
	byName := make(map[string]*migratedv1.EvacuatedVM)
	for _, vm := range view.GetVms() {
		byName[vm.GetName()] = vm
	}
	for name, want := range map[string]migratedv1.EvacuatedVMState{
		"refused":     migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_CANNOT_MOVE,
		"nowhere":     migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_CANNOT_MOVE,
		"elsewhere":   migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_MOVED,
		"unlucky":     migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_MOVED,
		"interrupted": migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_MOVED,
		"busy":        migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_MOVED,
		"interfered":  migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_FAILED,
		"hopeless":    migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_FAILED,
		"ended":       migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_ENDED,
		"lost":        migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_FAILED,
		"queued":      migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_MOVED,
		"twice":       migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_FAILED,
		"resurrected": migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_FAILED,
		"fine":        migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_MOVED,
	} {
		if got := byName[name].GetState(); got != want {
			t.Errorf("%s: %v, want %v: %v", name, got, want, byName[name])
		}
	}
	if e := byName["nowhere"].GetError().GetMessage(); !strings.Contains(e, "b:1: no such CPU") ||
		!strings.Contains(e, "c:1: no such disk") {
		t.Errorf("nowhere: %q", e)
	}
	if n := byName["hopeless"].GetAttempts(); n != mostAttempts {
		t.Errorf("hopeless was tried %d times", n)
	}
	if n := byName["lost"].GetAttempts(); n != 1 {
		t.Errorf("a VM that is nobody knows where was moved %d times", n)
	}
	if vm := byName["twice"]; vm.GetLocation() != migratedv1.Location_LOCATION_UNKNOWN || vm.GetError() == nil {
		t.Errorf("a VM that runs on both hosts: %v", vm)
	}
	first, second := p.migrations[byName["unlucky"].GetMigration()], byName["unlucky"]
	if first.GetSpec().GetDestination() != second.GetDestination() || second.GetAttempts() != 2 {
		t.Errorf("unlucky: %v", second)
	}
	for id, m := range p.migrations {
		if m.GetSpec().GetVm() == "/vm/unlucky" && id != second.GetMigration() &&
			m.GetSpec().GetDestination() == second.GetDestination() {
			t.Errorf("unlucky was tried at %s twice, with another host at hand", second.GetDestination())
		}
	}
}

func TestNames(t *testing.T) {
	for name, spec := range map[string]*migratedv1.EvacuationSpec{
		`"x": no VM`: with(func(s *migratedv1.EvacuationSpec) { s.Vms = []string{"a", "x"} }),
		`"y": no VM`: with(func(s *migratedv1.EvacuationSpec) { s.Except = []string{"y"} }),
		`"z": no VM`: with(func(s *migratedv1.EvacuationSpec) { s.Weights = map[string]uint32{"z": 2} }),
		`"w": no VM`: with(func(s *migratedv1.EvacuationSpec) {
			s.Apart = []*migratedv1.Apart{{Vms: []string{"a", "w"}}}
		}),
		`"twin" is the name of`: with(func(s *migratedv1.EvacuationSpec) { s.Except = []string{"twin"} }),
	} {
		p := newFakeHost("a", "b", "twin", "twin")
		view := evacuate(t, p, spec)
		if view.GetState() != migratedv1.EvacuationState_EVACUATION_STATE_FAILED ||
			!strings.Contains(view.GetError().GetMessage(), name) || len(p.order) != 0 {
			t.Errorf("%v: %v, moved %v", spec, view, p.order)
		}
	}
	p := newFakeHost("a", "b", "c")
	view := evacuate(t, p, with(func(s *migratedv1.EvacuationSpec) {
		s.Vms, s.Except = []string{"a", "/vm/b"}, []string{"a"}
	}))
	want(t, view, migratedv1.EvacuationState_EVACUATION_STATE_DONE, "b moved b:1")
}

func TestPlanOnly(t *testing.T) {
	p := newFakeHost("a")
	p.rooms["b:1"] = errors.New("no route to host")
	view := evacuate(t, p, with(func(s *migratedv1.EvacuationSpec) { s.PlanOnly = true }))
	want(t, view, migratedv1.EvacuationState_EVACUATION_STATE_PLANNED, "a waiting c:1")
	if len(p.order) != 0 || len(view.GetWarnings()) != 1 ||
		!strings.Contains(view.GetWarnings()[0], "b:1 is left out: no route to host") {
		t.Errorf("moved %v, warnings %q", p.order, view.GetWarnings())
	}
	p.rooms["c:1"] = errors.New("it is on fire")
	if view := evacuate(t, p, to); view.GetState() != migratedv1.EvacuationState_EVACUATION_STATE_FAILED ||
		len(p.order) != 0 {
		t.Errorf("without a destination: %v", view)
	}
}

// TestLateVM: a VM that is started during the evacuation is shown in it.
func TestLateVM(t *testing.T) {
	p := newFakeHost("a")
	p.started = func(string) { p.vms = append(p.vms, &migratedv1.HostVM{Vm: "/vm/late", Name: "late", Pid: 999}) }
	view := evacuate(t, p, to)
	want(t, view, migratedv1.EvacuationState_EVACUATION_STATE_DONE, "a moved b:1, late cannot_move ")
}

// TestVMsNotKnownAtTheEnd: where this host does not say which VMs it has, it is not declared empty.
func TestVMsNotKnownAtTheEnd(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		p := newFakeHost("a")
		m := open(t, t.Context(), dir, p)
		if _, err := m.Begin("e", to); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		p.change(func(*migratedv1.HostVM) {}, errors.New("too many open files"))
		m.Wait()
		view, _, err := m.Snapshot("e")
		if err != nil {
			t.Fatal(err)
		}
		want(t, view, migratedv1.EvacuationState_EVACUATION_STATE_DONE, "a moved b:1")
		if got := view.GetError(); !strings.Contains(got.GetMessage(), "not known: too many open files") ||
			got.GetRemedy() == "" {
			t.Errorf("the error is %v", got)
		}
	})
}

// TestChangedWhilePaused: after a pause, another VM at an address of the plan is not moved, nor is one that the address
// does not reach any more, unless it does again soon, as when libvirt's daemon restarts. The location of a VM that is
// gone is unknown. Nothing begins as long as the host cannot say which VMs it has.
func TestChangedWhilePaused(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		p := newFakeHost("a", "b", "other", "gone", "renamed", "back", "same")
		m := open(t, t.Context(), dir, p)
		if _, err := m.Begin("e", to); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if _, err := m.Pause("e"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		p.change(func(vm *migratedv1.HostVM) {
			switch vm.GetName() {
			case "other":
				vm.Name, vm.Pid = "new", 999
			case "gone":
				vm.Vm, vm.Name, vm.Pid = "/vm/unrelated", "unrelated", 998
			case "renamed", "back":
				vm.Vm = "/elsewhere/" + vm.GetName()
			}
		}, errors.New("too many open files"))
		if _, err := m.Resume("e"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		view, _, err := m.Snapshot("e")
		if err != nil || len(p.order) != 2 || strings.Count(states(view), "waiting") != 5 {
			t.Errorf("without knowing the VMs: %v, moved %v, %v", view, p.order, err)
		}
		p.change(func(*migratedv1.HostVM) {}, nil)
		time.Sleep(20 * time.Second)
		p.change(func(vm *migratedv1.HostVM) {
			if vm.GetName() == "back" {
				vm.Vm = "/vm/back"
			}
		}, nil)
		m.Wait()
		if view, _, err = m.Snapshot("e"); err != nil {
			t.Fatal(err)
		}
		want(t, view, migratedv1.EvacuationState_EVACUATION_STATE_DONE, "a moved b:1, b moved c:1, back moved c:1, "+
			"gone cannot_move c:1, new cannot_move , other cannot_move b:1, renamed cannot_move b:1, same moved b:1, "+
			"unrelated cannot_move ")
		if got := strings.Join(p.order[2:], " "); got != "/vm/same /vm/back" {
			t.Errorf("after the pause it moved %s", got)
		}
		for _, vm := range view.GetVms() {
			said, known := vm.GetError(), vm.GetLocation() != migratedv1.Location_LOCATION_UNKNOWN
			words := map[string]string{
				"other": "another VM by now, process 999", "gone": "no longer on this host",
				"renamed": "no longer reached at",
			}[vm.GetName()]
			if words != "" && (!strings.Contains(said.GetMessage(), words) || said.GetRemedy() == "" ||
				known != (vm.GetName() == "renamed")) {
				t.Errorf("%s: %v", vm.GetName(), vm)
			}
		}
	})
}

// TestGoneAfterAFailure: a VM that ends after a failed attempt is not tried again, and has failed.
func TestGoneAfterAFailure(t *testing.T) {
	p := newFakeHost("a")
	p.outcome = func(string, int) *migratedv1.Migration {
		p.vms = nil
		return &migratedv1.Migration{
			State: migratedv1.MigrationState_MIGRATION_STATE_FAILED, Location: migratedv1.Location_LOCATION_SOURCE,
			Error: &migratedv1.MigrationError{Message: "it failed", Reason: migratedv1.Reason_REASON_UNREACHABLE},
		}
	}
	view := evacuate(t, p, to)
	want(t, view, migratedv1.EvacuationState_EVACUATION_STATE_DONE, "a failed c:1")
	if vm := view.GetVms()[0]; vm.GetAttempts() != 1 || vm.GetLocation() != migratedv1.Location_LOCATION_UNKNOWN {
		t.Errorf("%v", vm)
	}
}

// TestHandedOverBesideThePlan: a VM that another migration has handed over since the plan was made is not tried, and is
// named.
func TestHandedOverBesideThePlan(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		p := newFakeHost("a", "b", "c")
		m := open(t, t.Context(), dir, p)
		if _, err := m.Begin("e", to); err != nil {
			t.Fatal(err)
		}
		synctest.Wait() // a and b are on their way
		p.change(func(vm *migratedv1.HostVM) {
			if vm.GetName() == "c" {
				vm.Problem = "handed over, see 'migrated status m1'"
			}
		}, nil)
		m.Wait()
		view, _, err := m.Snapshot("e")
		if err != nil {
			t.Fatal(err)
		}
		want(t, view, migratedv1.EvacuationState_EVACUATION_STATE_DONE, "a moved b:1, b moved c:1, c cannot_move b:1")
		for _, vm := range view.GetVms() {
			if vm.GetName() == "c" && (vm.GetLocation() != migratedv1.Location_LOCATION_UNKNOWN ||
				!strings.Contains(vm.GetError().GetMessage(), "migrated status m1")) {
				t.Errorf("%v", vm)
			}
		}
	})
}

// TestIDOfAnEarlierEvacuation: the end of a migration of an earlier evacuation of the same id is not taken for that of
// a migration of this one.
func TestIDOfAnEarlierEvacuation(t *testing.T) {
	p := newFakeHost("a")
	p.migrations["e-1-1"] = &migratedv1.Migration{
		Id: "e-1-1", State: migratedv1.MigrationState_MIGRATION_STATE_COMPLETED,
		Location: migratedv1.Location_LOCATION_DESTINATION,
	}
	view := evacuate(t, p, to)
	want(t, view, migratedv1.EvacuationState_EVACUATION_STATE_DONE, "a moved b:1")
	if id := view.GetVms()[0].GetMigration(); len(p.order) != 1 || id != "e-1-1.2" {
		t.Errorf("moved %v, by %s", p.order, id)
	}
}

// TestTimeForLargeVMs: the check of a VM whose memory is touched first has as much time as its migration would, and as
// much to wait for its turn.
func TestTimeForLargeVMs(t *testing.T) {
	p := newFakeHost("a")
	p.machine = &migratedv1.SourceMachine{RamBlocks: []*migratedv1.RamBlock{{Size: 512 << 30, Populated: true}}}
	evacuate(t, p, with(func(s *migratedv1.EvacuationSpec) { s.PlanOnly = true }))
	if want := 2 * (time.Minute + 512*time.Second); p.checkTime < want {
		t.Errorf("it had %v, not %v", p.checkTime, want)
	}
}
