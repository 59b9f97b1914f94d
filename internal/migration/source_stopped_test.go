// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// If somebody continues a VM while the hand-over is not answered, the source does not send Run again. It asks the
// destination to give up, until that says whether it runs the VM.
func TestContinuedVMIsNotHandedOverAgain(t *testing.T) {
	for name, c := range map[string]struct {
		abort  func(attempt int) error
		aborts int
		says   string
	}{
		"the destination gives up": {nil, 1, ErrNotRun.Error()},
		"the VM has ended there": {func(int) error {
			return ToStatus(codes.FailedPrecondition, errQEMUGone)
		}, 1, remedyOlderMemory},
		"it had the whole VM": {func(int) error {
			return ToStatus(codes.FailedPrecondition, withRemedy(errors.New("gone since"), "look on a third host"))
		}, 1, "look on a third host"},
		"it does not answer at once": {func(attempt int) error {
			if attempt < 3 {
				return status.Error(codes.Unavailable, "a broken wire")
			}
			return nil
		}, 3, ErrNotRun.Error()},
		"it runs the VM": {func(int) error {
			return status.Error(codes.FailedPrecondition, "the VM's QEMU on the destination lives, and was told to run it")
		}, 1, "both write to the same disks"},
		"it knows nothing": {func(int) error { return status.Error(codes.NotFound, "no such migration") }, 1, "does not say"},
	} {
		t.Run(name, func(t *testing.T) {
			asked, continued := make(chan struct{}), make(chan struct{})
			s := newStageWith(t, t.Context(), &peer{abort: c.abort, run: func(attempt int) (*migratedv1.RunResponse, error) {
				if attempt > 1 {
					return runAtOnce(attempt)
				}
				close(asked)
				<-continued
				return nil, status.Error(codes.Unavailable, "a broken wire")
			}})
			s.source.Start()
			<-asked
			s.continueAnyway(t)
			close(continued)
			s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, "somebody continued the VM")
			s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, "the VM runs on the source")
			s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, c.says)
			if s.peer.runs != 1 || s.peer.aborts != c.aborts {
				t.Errorf("told %d times to run the VM, %d times to give up", s.peer.runs, s.peer.aborts)
			}
			view, _ := s.source.Snapshot()
			here := c.says == ErrNotRun.Error() || c.says == remedyOlderMemory
			if (view.GetLocation() == migratedv1.Location_LOCATION_SOURCE) != here ||
				here && strings.Contains(view.GetError().GetRemedy(), remedyRunsTwice) {
				t.Errorf("the VM is at %v: %v", view.GetLocation(), view.GetError())
			}
			if !s.vmRuns(t) {
				t.Error("the VM does not run")
			}
			s.noRecord(t)
			if err := s.source.Delete(t.Context()); err != nil {
				t.Errorf("nothing is left here to protect: %v", err)
			}
		})
	}
}

// A VM that was continued and stopped again is not the one that the destination has.
func TestContinuedAndStoppedVMIsNotHandedOver(t *testing.T) {
	s := newStage(t, t.Context(), runAtOnce)
	s.peer.load = func(context.Context) error { // answers as if nothing had happened
		s.command(t, "cont", nil, nil)
		s.command(t, "stop", nil, nil)
		return nil
	}
	s.source.Start()
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, "somebody continued the VM")
	if s.peer.runs != 0 || s.peer.runRequest != nil || s.handedOver(t) {
		t.Errorf("%d hand-overs", s.peer.runs)
	}
}

// A daemon that takes up a committed migration and finds the VM running also asks the destination to give up.
func TestTakenUpSourceAsksForAContinuedVM(t *testing.T) {
	s := committed(t)
	s.continueAnyway(t)
	s.peer.run = runAtOnce
	s.peer.abort = func(int) error {
		return status.Error(codes.FailedPrecondition, "the VM's QEMU on the destination lives, and was told to run it")
	}
	runs := s.peer.runs
	s.takeUp(t)
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, "both write to the same disks")
	if s.peer.runs != runs || s.peer.aborts != 1 || !s.vmRuns(t) {
		t.Errorf("told %d times to run the VM, %d times to give up", s.peer.runs-runs, s.peer.aborts)
	}
	s.noRecord(t)
}

// While the source's QEMU does not answer whether the VM stands still, the source does not send Run again.
func TestHandOverWaitsForTheSourcesQEMU(t *testing.T) {
	var s *stage
	ready := make(chan struct{})
	s = newStage(t, t.Context(), func(attempt int) (*migratedv1.RunResponse, error) {
		if attempt > 1 {
			return runAtOnce(attempt)
		}
		<-ready
		if err := s.qemu.Process.Signal(syscall.SIGSTOP); err != nil {
			t.Error(err)
		}
		return nil, status.Error(codes.Unavailable, "a broken wire")
	})
	close(ready) // s is set
	s.source.Start()
	for view, changed := s.source.Snapshot(); !strings.Contains(
		view.GetError().GetMessage(), errStoppedUnknown.Error(),
	); view, changed = s.source.Snapshot() {
		if Terminal(view.GetState()) {
			t.Fatal(view.GetError())
		}
		<-changed
	}
	s.peer.mu.Lock()
	runs := s.peer.runs
	s.peer.mu.Unlock()
	if err := s.qemu.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, "")
	if runs != 1 || s.peer.runs != 2 {
		t.Errorf("told %d times to run the VM while that was not known, %d times in all", runs, s.peer.runs)
	}
}

// TestVMThatPowersOffWhileItIsStopped: the guest powers off when QEMU has just stopped the VM, which QEMU then calls
// "paused". The VM is not run at the destination, nor continued at the source.
func TestVMThatPowersOffWhileItIsStopped(t *testing.T) {
	var s *stage
	ready := make(chan struct{})
	s = newStageWith(t, t.Context(), &peer{run: runAtOnce, load: func(context.Context) error {
		<-ready
		s.hmp(t, "o /h 0x604 0x2000") // PM1a_CNT: SLP_EN and S5
		return nil
	}}, "-no-shutdown", "-bios", haltingFirmware(t))
	// As firmware does: PMBASE of the ICH9's LPC bridge, and ACPI_EN of its ACPI_CNTL.
	for _, line := range []string{
		"o /w 0xcf8 0x8000f840", "o /w 0xcfc 0x601", "o /w 0xcf8 0x8000f844", "o /b 0xcfc 0x80",
	} {
		s.hmp(t, line)
	}
	close(ready) // s is set
	s.source.Start()
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, "its guest powered off")
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, "is not continued")
	if view, _ := s.source.Snapshot(); view.GetError().GetReason() != migratedv1.Reason_REASON_VM_STOPPED_ITSELF {
		t.Errorf("it says %v", view.GetError())
	}
	if s.peer.runs != 0 || s.vmRuns(t) {
		t.Errorf("%d hand-overs; it runs at the source: %t", s.peer.runs, s.vmRuns(t))
	}
	s.noRecord(t)
}

// hmp executes a command for people at QEMU's other monitor.
func (s *stage) hmp(t *testing.T, line string) {
	t.Helper()
	s.command(t, "human-monitor-command", map[string]string{"command-line": line}, nil)
	s.vmRuns(t) // QEMU has carried out by now what the command caused
}
