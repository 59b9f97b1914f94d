// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"errors"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/migrated-vm/migrated/internal/qemu"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// TestContinuedVMOutlivesTheMigration: an operator continued the VM at the source, and then ended the one at the
// destination, or let it get all of its memory. The VM at the source is left alone.
func TestContinuedVMOutlivesTheMigration(t *testing.T) {
	for name, c := range map[string]struct {
		answer   *migratedv1.WatchIncomingResponse
		state    migratedv1.MigrationState
		location migratedv1.Location
		words    string
	}{
		"ended there": {&migratedv1.WatchIncomingResponse{
			State:    migratedv1.MigrationState_MIGRATION_STATE_FAILED,
			Location: migratedv1.Location_LOCATION_ENDED,
			Error:    &migratedv1.MigrationError{Message: "somebody ended it", Reason: migratedv1.Reason_REASON_QEMU_QUIT},
		}, migratedv1.MigrationState_MIGRATION_STATE_ENDED, migratedv1.Location_LOCATION_SOURCE, "continued on the source"},
		"completed": {&migratedv1.WatchIncomingResponse{
			State: migratedv1.MigrationState_MIGRATION_STATE_COMPLETED,
		}, migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, migratedv1.Location_LOCATION_DESTINATION, "both write"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t, t.Context(), runAtOnce)
			following, over := make(chan struct{}, 1), make(chan struct{})
			s.peer.setWatch(func(stream grpc.ServerStreamingServer[migratedv1.WatchIncomingResponse]) error {
				select {
				case following <- struct{}{}:
				default:
				}
				<-over
				return stream.Send(c.answer)
			})
			s.source.Start()
			<-following
			s.continueAnyway(t)
			close(over)
			s.expect(t, c.state, c.words)
			if view, _ := s.source.Snapshot(); view.GetLocation() != c.location {
				t.Errorf("the VM is at %v", view.GetLocation())
			}
			if !s.vmRuns(t) {
				t.Error("the VM was ended")
			}
			s.noRecord(t)
		})
	}
}

// TestSourceQEMUIsEndedLater: a daemon that was started again cannot connect to the QEMU that is no longer needed. The
// record stays, so that nobody takes that QEMU for the VM, until it is ended.
func TestSourceQEMUIsEndedLater(t *testing.T) {
	s := committed(t)
	if err := s.records.Complete("m1", migratedv1.Reason_REASON_UNSPECIFIED, nil); err != nil {
		t.Fatal(err)
	}
	monitor, err := qemu.Attach(t.Context(), s.vm)
	if err != nil {
		t.Fatal(err)
	}
	s.takeUp(t)
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, "")
	if !s.handedOver(t) {
		t.Error("the record was removed, although QEMU lives")
	}
	if err := monitor.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.qemu.Wait(); err != nil {
		t.Errorf("the source's QEMU: %v", err)
	}
	for records, err := s.records.All(); len(records) > 0; records, err = s.records.All() {
		if err != nil || t.Context().Err() != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond)
	}
}

// TestDeletedMigrationLeavesALaterOneAlone: a migration of the same id has begun before the earlier one's QEMU was
// found to have ended. Its record stays.
func TestDeletedMigrationLeavesALaterOneAlone(t *testing.T) {
	s := committed(t)
	rec, found, err := s.records.find("m1")
	if err != nil || !found {
		t.Fatalf("the record: %v, %v", found, err)
	}
	rec.HandedOver = rec.HandedOver.Add(-time.Minute)
	s.source.removeRecordOf(rec)
	if _, found, err := s.records.find("m1"); err != nil || !found {
		t.Errorf("the later one's record is gone: %v, %v", found, err)
	}
}

// TestOldRecordDoesNotContinueTheVM: a migration could not continue the VM, and left its record. A later one has handed
// the VM over. A restarted daemon does not continue the VM for the first one.
func TestOldRecordDoesNotContinueTheVM(t *testing.T) {
	s := committed(t)
	later, found, err := s.records.find("m1")
	if err != nil || !found {
		t.Fatalf("the record: %v, %v", found, err)
	}
	old := later
	old.ID, old.Committed = "m0", false
	if err := s.records.Prepare(old); err != nil {
		t.Fatal(err)
	}
	source, err := TakeUpSource(t.Context(), s.takeUpConfig(), old)
	if err != nil {
		t.Fatal(err)
	}
	<-source.Done()
	view, _ := source.Snapshot()
	if view.GetState() != migratedv1.MigrationState_MIGRATION_STATE_FAILED ||
		!strings.Contains(view.GetError().GetMessage(), "or is moving it: m1") {
		t.Errorf("it is %v: %v", view.GetState(), view.GetError())
	}
	if s.vmRuns(t) || !s.handedOver(t) {
		t.Error("the VM that was handed over runs")
	}
	if _, found, err := s.records.find("m0"); found || err != nil {
		t.Errorf("the old record is left: %v, %v", found, err)
	}
}

// TestVMOfAnotherMigrationIsNotContinued: the VM of an old record is being moved by another migration.
func TestVMOfAnotherMigrationIsNotContinued(t *testing.T) {
	s, monitor := stoppedByDaemon(t)
	claim, err := qemuClaims.claimVM(monitor, "m2")
	if err != nil {
		t.Fatal(err)
	}
	if err := monitor.Close(); err != nil {
		t.Fatal(err)
	}
	s.takeUp(t)
	s.awaitView(t, func(m *migratedv1.Migration) bool {
		return strings.Contains(m.GetError().GetMessage(), "being migrated already, by migration m2")
	})
	if s.vmRuns(t) {
		t.Error("the VM was continued")
	}
	qemuClaims.unclaim(claim)
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, "the VM runs on the source")
	s.noRecord(t)
}

// TestVMThatCouldNotBeContinued: a VM that stands still because an earlier migration could not continue it is not
// moved: it would arrive paused. Once somebody has continued it, it is.
func TestVMThatCouldNotBeContinued(t *testing.T) {
	s, monitor := stoppedByDaemon(t)
	if err := monitor.Close(); err != nil {
		t.Fatal(err)
	}
	move := func() *Source {
		cfg := s.takeUpConfig()
		cfg.ID, cfg.Spec = "m2", &migratedv1.MigrationSpec{Vm: s.vm, Destination: s.source.cfg.Spec.GetDestination()}
		source := NewSource(t.Context(), cfg)
		source.Start()
		<-source.Done()
		return source
	}
	view, _ := move().Snapshot()
	if view.GetState() != migratedv1.MigrationState_MIGRATION_STATE_FAILED ||
		!strings.Contains(view.GetError().GetMessage(), "migration m1 stopped it") || view.GetError().GetRemedy() == "" {
		t.Errorf("it is %v: %v", view.GetState(), view.GetError())
	}
	s.command(t, "cont", nil, nil)
	if view, _ := move().Snapshot(); view.GetState() != migratedv1.MigrationState_MIGRATION_STATE_COMPLETED {
		t.Errorf("it is %v: %v", view.GetState(), view.GetError())
	}
	s.noRecord(t)
}

// TestVMMovedByALaterMigration: while a restarted daemon waits for the monitor, the VM went on, and a later migration
// has removed the record, moved the VM and ended its QEMU. The VM is not declared to be nowhere.
func TestVMMovedByALaterMigration(t *testing.T) {
	s, monitor := stoppedByDaemon(t)
	s.takeUp(t)
	s.awaitView(t, notConnected)
	if err := errors.Join(s.records.Remove("m1"), s.qemu.Process.Kill(), monitor.Close()); err != nil {
		t.Fatal(err)
	}
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, errSuperseded.Error())
	if view, _ := s.source.Snapshot(); view.GetLocation() != migratedv1.Location_LOCATION_UNKNOWN {
		t.Errorf("the VM is at %v", view.GetLocation())
	}
}

// TestFallBackWhileTheMonitorIsHeld: the command fails at once if this host's QEMU cannot be continued, and the
// migration is not shown as one that fell back.
func TestFallBackWhileTheMonitorIsHeld(t *testing.T) {
	s := committed(t)
	monitor, err := qemu.Attach(t.Context(), s.vm)
	if err != nil {
		t.Fatal(err)
	}
	s.peer.setWatch(unreachable)
	s.takeUp(t)
	s.awaitView(t, notConnected)
	if err := s.source.FallBack(t.Context()); err == nil || Remedy(err) == "" {
		t.Errorf("it fell back: %v", err)
	}
	view, _ := s.source.Snapshot()
	if view.GetError().GetReason() == migratedv1.Reason_REASON_FELL_BACK || !s.handedOver(t) {
		t.Errorf("it is shown as %v", view)
	}
	if err := monitor.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.source.FallBack(t.Context()); err != nil || !s.vmRuns(t) {
		t.Errorf("with the monitor free: %v", err)
	}
}
