// SPDX-License-Identifier: Apache-2.0

package evacuation

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// beginOnly begins the evacuation e with a daemon that ends a minute later.
func beginOnly(t *testing.T, dir string, p *fakeHost) {
	t.Helper()
	life, die := context.WithCancel(t.Context())
	m := open(t, life, dir, p)
	if _, err := m.Begin("e", to); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Minute)
	die()
	m.Wait()
}

// TestTakenUp: a restarted daemon continues an evacuation, whatever happened to the migrations that were under way.
func TestTakenUp(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		p := newFakeHost("a", "b", "c", "d")
		p.outcome = func(string, int) *migratedv1.Migration { return &migratedv1.Migration{} } // they do not end
		beginOnly(t, dir, p)
		// One migration was lost with the daemon, and its VM is still here. The other was taken up.
		p.outcome = nil
		begun := slices.Clone(p.order)
		p.mu.Lock()
		for id, migration := range p.migrations {
			if migration.GetSpec().GetVm() == begun[0] {
				delete(p.migrations, id)
				p.now--
			}
		}
		p.mu.Unlock()
		for id := range p.migrations {
			p.end(id)
		}
		m := open(t, t.Context(), dir, p)
		m.Wait()
		view, _, err := m.Snapshot("e")
		if err != nil {
			t.Fatal(err)
		}
		want(t, view, migratedv1.EvacuationState_EVACUATION_STATE_DONE, "a moved b:1, b moved c:1, c moved b:1, d moved c:1")
		if n := len(p.order); n != 5 {
			t.Errorf("migrations of %v began", p.order)
		}
	})
}

// TestTakenUpWithoutItsVM: the location of a VM is unknown if its migration is unknown and the VM is not here.
func TestTakenUpWithoutItsVM(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		p := newFakeHost("a")
		p.outcome = func(string, int) *migratedv1.Migration { return &migratedv1.Migration{} }
		beginOnly(t, dir, p)
		clear(p.migrations)
		p.vms = nil
		m := open(t, t.Context(), dir, p)
		m.Wait()
		view, _, err := m.Snapshot("e")
		if err != nil {
			t.Fatal(err)
		}
		want(t, view, migratedv1.EvacuationState_EVACUATION_STATE_DONE, "a failed b:1")
		if vm := view.GetVms()[0]; vm.GetLocation() != migratedv1.Location_LOCATION_UNKNOWN {
			t.Errorf("it is said to be %v", vm.GetLocation())
		}
	})
}

// TestTakenUpAgainAndAgain: a VM whose migrations are lost with their daemons is tried as often as one whose migrations
// fail, and not without a pause.
func TestTakenUpAgainAndAgain(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		p := newFakeHost("a")
		p.outcome = func(string, int) *migratedv1.Migration { return &migratedv1.Migration{} }
		for n := range mostAttempts {
			life, die := context.WithCancel(t.Context())
			m := open(t, life, dir, p)
			if _, err := m.Begin("e", to); err != nil { // the evacuation that was taken up, if there is one
				t.Fatal(err)
			}
			time.Sleep(time.Second)
			p.mu.Lock()
			if n > 0 && len(p.migrations) != 0 {
				t.Errorf("it was tried again at once: %v", p.order)
			}
			p.mu.Unlock()
			time.Sleep(2 * mostRetryTime)
			die()
			m.Wait()
			p.mu.Lock()
			clear(p.migrations)
			p.mu.Unlock()
		}
		p.mu.Lock()
		p.outcome = nil
		p.mu.Unlock()
		m := open(t, t.Context(), dir, p)
		m.Wait()
		view, _, err := m.Snapshot("e")
		if err != nil {
			t.Fatal(err)
		}
		want(t, view, migratedv1.EvacuationState_EVACUATION_STATE_DONE, "a failed b:1")
		vm := view.GetVms()[0]
		if len(p.order) != mostAttempts || vm.GetLocation() != migratedv1.Location_LOCATION_SOURCE ||
			vm.GetError().GetRemedy() == "" {
			t.Errorf("it was tried %d times: %v", len(p.order), vm)
		}
	})
}

// TestTakenUpWithoutLibvirt: a VM whose migration was lost is not said to be gone as long as its process is here, for
// example while libvirt's daemon is away, and is moved when it is reached again.
func TestTakenUpWithoutLibvirt(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		p := newFakeHost("a")
		p.outcome = func(string, int) *migratedv1.Migration { return &migratedv1.Migration{} }
		beginOnly(t, dir, p)
		clear(p.migrations)
		p.outcome = nil
		p.change(func(vm *migratedv1.HostVM) { vm.Vm = "" }, nil)
		m := open(t, t.Context(), dir, p)
		time.Sleep(time.Second)
		view, _, err := m.Snapshot("e")
		if err != nil {
			t.Fatal(err)
		}
		want(t, view, migratedv1.EvacuationState_EVACUATION_STATE_RUNNING, "a waiting b:1")
		p.change(func(vm *migratedv1.HostVM) { vm.Vm = "/vm/a" }, nil)
		m.Wait()
		if view, _, err = m.Snapshot("e"); err != nil {
			t.Fatal(err)
		}
		want(t, view, migratedv1.EvacuationState_EVACUATION_STATE_DONE, "a moved b:1")
	})
}
