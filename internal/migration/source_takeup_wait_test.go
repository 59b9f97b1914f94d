// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/migrated-vm/migrated/internal/qemu"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// stoppedByDaemon returns a stage whose daemon died while the VM stood still, before the commit point. monitor is a
// connection to QEMU's monitor, as another client would have one; the caller closes it. changes are made to the record.
func stoppedByDaemon(t *testing.T, changes ...func(*Record)) (s *stage, monitor *qemu.VM) {
	t.Helper()
	s = newStage(t, t.Context(), runAtOnce)
	if err := s.source.Cancel(); err != nil {
		t.Fatal(err)
	}
	<-s.source.Done()
	s.command(t, "stop", nil, nil)
	monitor, err := qemu.Attach(t.Context(), s.vm)
	if err != nil {
		t.Fatal(err)
	}
	identity, err := monitor.Identity()
	if err != nil {
		t.Fatal(err)
	}
	spec, err := protojson.Marshal(s.source.cfg.Spec)
	if err != nil {
		t.Fatal(err)
	}
	rec := Record{
		Protocol: savesDevices, ID: "m1", VM: s.vm, Identity: identity, Spec: spec,
		Token: "token", WasRunning: true, HandedOver: time.Now(),
	}
	for _, change := range changes {
		change(&rec)
	}
	if err := s.records.Prepare(rec); err != nil {
		t.Fatal(err)
	}
	return s, monitor
}

// If a daemon dies while the VM stands still, before the commit point, the next one continues the VM. Those of the
// first protocol's version had QEMU move the device state.
func TestTakenUpSourceContinuesItsVM(t *testing.T) {
	for _, protocol := range []uint32{1, savesDevices} {
		t.Run(fmt.Sprint(protocol), func(t *testing.T) {
			s, monitor := stoppedByDaemon(t, func(rec *Record) { rec.Protocol = protocol })
			if err := monitor.Close(); err != nil {
				t.Fatal(err)
			}
			s.takeUp(t)
			s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, "the VM runs on the source")
			if !s.vmRuns(t) {
				t.Error("the VM does not run")
			}
			if s.peer.runs != 0 {
				t.Error("the destination was told to run the VM")
			}
			s.noRecord(t)
		})
	}
}

// If somebody else has QEMU's monitor when the daemon is restarted, the VM is continued when the monitor is free, also
// if somebody has cancelled the migration meanwhile.
func TestTakenUpSourceWaitsForItsMonitor(t *testing.T) {
	for name, cancelled := range map[string]bool{"not cancelled": false, "cancelled": true} {
		t.Run(name, func(t *testing.T) {
			s, monitor := stoppedByDaemon(t)
			s.takeUp(t)
			s.awaitView(t, notConnected)
			if cancelled {
				if err := s.source.Cancel(); err != nil {
					t.Error(err)
				}
			}
			if err := monitor.Close(); err != nil {
				t.Fatal(err)
			}
			s.givenBack(t)
		})
	}
}

// notConnected reports whether a migration waits for the monitor of the VM's QEMU.
func notConnected(m *migratedv1.Migration) bool {
	return !Terminal(m.GetState()) && strings.Contains(m.GetError().GetRemedy(), "can be connected to")
}

// A daemon that ends while somebody else has the monitor leaves the migration to the next one.
func TestTakenUpSourceIsLeftAgain(t *testing.T) {
	s, monitor := stoppedByDaemon(t)
	daemon, end := context.WithCancelCause(t.Context())
	s.takeUpIn(t, daemon)
	s.awaitView(t, notConnected)
	end(errors.New("the daemon ends"))
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_DEVICE, "start the source's daemon again")
	if err := monitor.Close(); err != nil {
		t.Fatal(err)
	}
	s.takeUp(t)
	s.givenBack(t)
}

// A VM whose QEMU answers now where the record's did is another one: it stays paused. The record stays for a daemon
// that finds the right one.
func TestTakenUpSourceLeavesAnotherVMAlone(t *testing.T) {
	other := newStage(t, t.Context(), runAtOnce)
	if err := other.source.Cancel(); err != nil { // it gives the monitor back
		t.Fatal(err)
	}
	<-other.source.Done()
	other.command(t, "stop", nil, nil)
	s, monitor := stoppedByDaemon(t, func(rec *Record) { rec.VM = other.vm })
	if err := monitor.Close(); err != nil {
		t.Fatal(err)
	}
	s.takeUp(t)
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, "another QEMU answers")
	if other.vmRuns(t) {
		t.Error("another VM was continued")
	}
	if _, found, err := s.records.find("m1"); !found || err != nil {
		t.Errorf("the record is gone: %v, %v", found, err)
	}
}

// Nor is it continued by 'migrated fallback', whatever other migration has handed it over.
func TestFallBackLeavesAnotherVMAlone(t *testing.T) {
	s, other := committed(t), committed(t)
	s.peer.setWatch(unreachable)
	rec, found, err := other.records.find("m1")
	if err != nil || !found {
		t.Fatalf("the record of the other VM: %v, %v", found, err)
	}
	rec.ID = "m2"
	if err := errors.Join(s.records.Prepare(rec), s.records.Commit(rec.ID)); err != nil {
		t.Fatal(err)
	}
	s.source.cfg.Spec.Vm = other.vm
	if err := s.source.FallBack(t.Context()); err == nil || !strings.Contains(err.Error(), "another QEMU answers") {
		t.Errorf("falling back: %v", err)
	}
	if other.vmRuns(t) || !other.handedOver(t) {
		t.Error("another VM was continued")
	}
}
