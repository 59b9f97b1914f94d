// SPDX-License-Identifier: Apache-2.0

package evacuation

import (
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

func TestPauseAndCancel(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		p := newFakeHost("a", "b", "c", "d", "e")
		m := open(t, t.Context(), dir, p)
		if _, err := m.Begin("e", with(func(s *migratedv1.EvacuationSpec) { s.Bandwidth = 1 << 20 })); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if p.limit != 1<<20 {
			t.Errorf("the limit is %d", p.limit)
		}
		if _, err := m.Begin("other", to); !errors.Is(err, ErrUnderWay) {
			t.Errorf("a second one: %v", err)
		}
		if _, err := m.Begin("e", to); !errors.Is(err, ErrExists) {
			t.Errorf("the same with another specification: %v", err)
		}
		if m.Follows("e-1-1") != "e" || m.Follows("e-9-1") != "" {
			t.Error("it does not know which migrations it waits for")
		}
		if _, err := m.Pause("e"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if len(p.order) != 2 {
			t.Errorf("while it was paused: %v", p.order)
		}
		if _, err := m.Resume("e"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(pollInterval)
		synctest.Wait()
		if len(p.order) != 4 {
			t.Errorf("after that: %v", p.order)
		}
		if _, err := m.Cancel("e"); err != nil {
			t.Fatal(err)
		}
		m.Wait()
		view, _, err := m.Snapshot("e")
		if err != nil {
			t.Fatal(err)
		}
		want(t, view, migratedv1.EvacuationState_EVACUATION_STATE_CANCELLED,
			"a moved b:1, b moved c:1, c cancelled b:1, d cancelled c:1, e cancelled b:1")
		if m.Follows("e-1-1") != "" {
			t.Error("it waits for a migration that is over")
		}
		if p.limit != 0 {
			t.Errorf("the limit stays: %d", p.limit)
		}
		if _, err := m.Cancel("e"); !errors.Is(err, ErrOver) {
			t.Errorf("once more: %v", err)
		}
		if _, err := m.Cancel("unknown"); !errors.Is(err, ErrUnknown) {
			t.Errorf("of another: %v", err)
		}
		time.Sleep(time.Minute) // for the goroutines of the fake host
	})
}

// TestPausedWhileItBegins: once a pause was acknowledged, no more migrations begin, although more are allowed.
func TestPausedWhileItBegins(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		p := newFakeHost("a", "b")
		m := open(t, t.Context(), dir, p)
		p.started = func(string) {
			p.started = nil
			if _, err := m.Pause("e"); err != nil {
				t.Error(err)
			}
		}
		if _, err := m.Begin("e", to); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		view, _, err := m.Snapshot("e")
		if err != nil {
			t.Fatal(err)
		}
		want(t, view, migratedv1.EvacuationState_EVACUATION_STATE_PAUSED, "a moved b:1, b waiting c:1")
		if _, err := m.Resume("e"); err != nil {
			t.Fatal(err)
		}
		m.Wait()
	})
}

// TestCancelledWithoutAPlan: an evacuation that is cancelled while its plan fails says that it has none. It has no VMs
// then, and would look like one of a host that is empty.
func TestCancelledWithoutAPlan(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		p := newFakeHost("a")
		p.unseen = errors.New("libvirt does not answer")
		p.looking = make(chan struct{})
		m := open(t, t.Context(), dir, p)
		if _, err := m.Begin("e", to); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if _, err := m.Cancel("e"); err != nil {
			t.Fatal(err)
		}
		close(p.looking)
		m.Wait()
		view, _, err := m.Snapshot("e")
		if err != nil {
			t.Fatal(err)
		}
		want(t, view, migratedv1.EvacuationState_EVACUATION_STATE_CANCELLED, "")
		if got := view.GetError().GetMessage(); !strings.Contains(got, "libvirt does not answer") {
			t.Errorf("it says %q", got)
		}
	})
}
