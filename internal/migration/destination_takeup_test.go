// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

func TestTakenUpAfterLoadingItRuns(t *testing.T) {
	l := leaveDestination(t, true)
	d := l.takeUp(t)
	if l.runs(t) {
		t.Fatal("the VM runs before Run")
	}
	first, err := run(t, d)
	if err != nil || !l.runs(t) {
		t.Fatalf("Run: %v; the VM runs: %v", err, l.runs(t))
	}
	if again, err := run(t, d); err != nil || !proto.Equal(again, first) {
		t.Errorf("Run again: %v, %v; want the first answer, %v", again, err, first)
	}
	if !l.filesStay() {
		t.Error("its files are gone before its memory is here")
	}
}

func TestTakenUpAfterLoadingItGivesUp(t *testing.T) {
	l := leaveDestination(t, true)
	d := l.takeUp(t)
	if err := d.Abort("the test says so"); err != nil {
		t.Fatal(err)
	}
	<-d.Done()
	if _, err := run(t, d); !errors.Is(err, ErrNotRun) {
		t.Errorf("Run after giving up: %v, want ErrNotRun", err)
	}
	l.gone(t)
}

// QEMU may not have got the command to run the VM. It is told again, and until then the migration cannot be given up.
func TestTakenUpAfterRunWasToldToNobody(t *testing.T) {
	l := leaveDestination(t, true)
	l.kept.header().toldToRun.Store(1)
	d := l.takeUp(t)
	if err := d.Abort("the test says so"); err == nil || reasonOf(err) != migratedv1.Reason_REASON_UNSPECIFIED {
		t.Errorf("a VM that may run is given up, or said to have ended: %v", err)
	}
	if _, err := run(t, d); err != nil || !l.runs(t) {
		t.Errorf("Run: %v; the VM runs: %v", err, l.runs(t))
	}
}

// QEMU may have run the VM before it died: nobody promises that the VM has not run.
func TestTakenUpToldQEMUDies(t *testing.T) {
	l := leaveDestination(t, true)
	l.kept.header().toldToRun.Store(1)
	d := l.takeUp(t)
	<-d.attaching
	if err := unix.Kill(l.pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := l.vm.WaitExit(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-d.Done()
	if _, err := run(t, d); err == nil || errors.Is(err, ErrNotRun) || errors.Is(err, errAskAgain) {
		t.Errorf("Run: %v; want another error than ErrNotRun", err)
	}
	if err := d.Abort("the VM was continued at the source"); reasonOf(err) !=
		migratedv1.Reason_REASON_DESTINATION_QEMU_ENDED {
		t.Errorf("a source that has the only VM is told: %v", err)
	}
}

// Both daemons were killed when the VM ended by itself. The source repeats Run and hears that the VM ran. It hears
// how the VM ended when it watches the migration.
func TestTakenUpAfterTheVMEnded(t *testing.T) {
	for name, answered := range map[string]bool{"Run was answered": true, "Run was not answered": false} {
		t.Run(name, func(t *testing.T) {
			l := leaveDestination(t, true)
			h := l.kept.header()
			h.toldToRun.Store(1)
			if answered {
				l.ran()
			}
			h.ended.Store(uint64(migratedv1.Reason_REASON_GUEST_SHUTDOWN))
			d := l.takeUp(t)
			<-d.Done()
			if _, err := run(t, d); err != nil {
				t.Errorf("Run: %v", err)
			}
			if view, _ := d.Snapshot(); view.GetState() != migratedv1.MigrationState_MIGRATION_STATE_ENDED ||
				view.GetError().GetReason() != migratedv1.Reason_REASON_GUEST_SHUTDOWN {
				t.Errorf("the migration is %v", view)
			}
		})
	}
}

// All memory was here, and QEMU's userfaultfd was closed: nothing is left to do.
func TestTakenUpAfterTheLastPage(t *testing.T) {
	l := leaveDestination(t, true)
	if _, err := l.vm.Cont(t.Context()); err != nil {
		t.Fatal(err)
	}
	h := l.kept.header()
	h.toldToRun.Store(1)
	l.ran()
	h.filled.Store(1)
	d := l.takeUp(t)
	<-d.Done()
	view, _ := d.Snapshot()
	if view.GetState() != migratedv1.MigrationState_MIGRATION_STATE_COMPLETED ||
		view.GetProgress().GetPagesPresent() != view.GetProgress().GetPagesTotal() ||
		view.GetProgress().GetDowntime().AsDuration() != 7*time.Millisecond {
		t.Errorf("the migration is %v", view)
	}
	if _, err := run(t, d); err != nil {
		t.Errorf("Run: %v", err)
	}
	if !l.runs(t) {
		t.Error("the VM does not run")
	}
	// The source may have died before it heard, and this daemon too.
	next := l.takeUp(t)
	<-next.Done()
	if view, _ := next.Snapshot(); view.GetState() != migratedv1.MigrationState_MIGRATION_STATE_COMPLETED {
		t.Errorf("to the next daemon the migration is %v", view.GetState())
	}
	if _, err := run(t, next); err != nil {
		t.Errorf("Run at the next daemon: %v", err)
	}
	if !l.filesStay() {
		t.Error("its word is forgotten at once")
	}
	d.Forget()
	next.Forget()
	if l.filesStay() || !l.runs(t) {
		t.Errorf("its files stay: %v; the VM runs: %v", l.filesStay(), l.runs(t))
	}
}

// The last page came just before the daemon ended. The source, which nobody can reach, is not needed any more.
func TestTakenUpWithAllPages(t *testing.T) {
	l := leaveDestination(t, true)
	if _, err := l.vm.Cont(t.Context()); err != nil {
		t.Fatal(err)
	}
	l.kept.header().toldToRun.Store(1)
	l.ran()
	for i, states := 0, l.kept.states(); i < len(states); i++ {
		states[i] = 0x44 // present, twice (TestStatesAreAFormat)
	}
	d := l.takeUp(t)
	select {
	case <-d.Done():
	case <-time.After(2 * time.Minute):
		t.Fatal("it waits for the source")
	}
	if view, _ := d.Snapshot(); view.GetState() != migratedv1.MigrationState_MIGRATION_STATE_COMPLETED {
		t.Errorf("the migration is %v", view)
	}
	if !l.runs(t) {
		t.Error("the VM does not run")
	}
}

func TestTakenUpAfterTheSwitch(t *testing.T) {
	l := leaveDestination(t, true)
	if _, err := l.vm.Cont(t.Context()); err != nil {
		t.Fatal(err)
	}
	l.kept.header().toldToRun.Store(1)
	l.ran()
	d := l.takeUp(t)
	answer, err := d.Run(t.Context(), &migratedv1.RunRequest{Id: "m1", Resume: true}) // answered without QEMU
	if err != nil || answer.GetResumeTime().AsDuration() != 3*time.Millisecond {
		t.Errorf("Run: %v, %v", answer, err)
	}
	if view, _ := d.Snapshot(); view.GetProgress().GetDowntime().AsDuration() != 7*time.Millisecond {
		t.Errorf("the downtime is %v", view.GetProgress().GetDowntime().AsDuration())
	}
	d.cancel(errors.New("the daemon ends again"))
	<-d.Done()
	if !l.filesStay() || !l.runs(t) {
		t.Error("the next daemon has nothing to go on with")
	}
}

// TestMovedPausedAndContinued: a VM that was moved paused, and that somebody continued here and then ended, also before
// a restart of the daemon, has run: its disks are newer than its memory at the source.
func TestMovedPausedAndContinued(t *testing.T) {
	for name, restarted := range map[string]bool{"by this daemon": false, "by the daemon before": true} {
		t.Run(name, func(t *testing.T) {
			l := leaveDestination(t, true)
			if restarted {
				l.kept.header().toldToRun.Store(1)
				l.kept.header().paused.Store(1)
				l.ran()
				if _, err := l.vm.Cont(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			d := l.takeUp(t)
			<-d.attaching
			if !restarted {
				if _, err := d.Run(t.Context(), &migratedv1.RunRequest{Id: "m1"}); err != nil {
					t.Fatal(err)
				}
				if _, err := l.vm.Cont(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			for paused := true; paused && t.Context().Err() == nil; time.Sleep(time.Millisecond) {
				d.limitMu.Lock()
				paused = d.kept.header().paused.Load() != 0
				d.limitMu.Unlock()
			}
			if err := l.vm.Quit(t.Context()); err != nil {
				t.Fatal(err)
			}
			<-d.Done()
			if view, _ := d.Snapshot(); view.GetState() != migratedv1.MigrationState_MIGRATION_STATE_ENDED {
				t.Errorf("the migration is %v: %v", view.GetState(), view.GetError())
			}
		})
	}
}

// A daemon that is stopped leaves its VM to the next one. The source must not hear of a failure: it would stop
// serving pages.
func TestStoppedAfterTheSwitch(t *testing.T) {
	l := leaveDestination(t, true)
	if _, err := l.vm.Cont(t.Context()); err != nil {
		t.Fatal(err)
	}
	l.kept.header().toldToRun.Store(1)
	l.ran()
	daemon, stop := context.WithCancelCause(t.Context())
	d := l.takeUpWith(t, daemon, noSource)
	stop(errors.New("the daemon was stopped"))
	<-d.Done()
	if view, _ := d.Snapshot(); view.GetState() != migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_PAUSED {
		t.Errorf("the migration is %v", view)
	}
	if !l.filesStay() || !l.runs(t) {
		t.Error("the next daemon has nothing to go on with")
	}
}

// A daemon that is stopped before its VM ran gives the VM up. The next daemon says so to a source that sends Run.
// Otherwise the VM would stay stopped until an operator came.
func TestStoppedBeforeTheSwitch(t *testing.T) {
	l := leaveDestination(t, true)
	daemon, stop := context.WithCancelCause(t.Context())
	d := l.takeUpWith(t, daemon, noSource)
	stop(errors.New("the daemon was stopped"))
	<-d.Done()
	if _, err := run(t, d); !errors.Is(err, ErrNotRun) {
		t.Errorf("Run: %v, want ErrNotRun", err)
	}
	if err := l.vm.WaitExit(t.Context()); err != nil {
		t.Error(err)
	}
	next := l.takeUp(t)
	<-next.Done()
	if _, err := run(t, next); !errors.Is(err, ErrNotRun) {
		t.Errorf("Run at the next daemon: %v, want ErrNotRun", err)
	}
	l.gone(t)
}

// Without the device state the migration cannot go on.
func TestTakenUpBeforeLoading(t *testing.T) {
	l := leaveDestination(t, false)
	d := l.takeUp(t)
	<-d.Done()
	if _, err := run(t, d); !errors.Is(err, ErrNotRun) {
		t.Errorf("Run: %v, want ErrNotRun", err)
	}
	l.gone(t)
}

func TestTakenUpWithoutQEMU(t *testing.T) {
	l := leaveDestination(t, true)
	l.kept.header().toldToRun.Store(1)
	if err := unix.Kill(l.pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := l.vm.WaitExit(t.Context()); err != nil {
		t.Fatal(err)
	}
	d := l.takeUp(t)
	<-d.Done()
	view, _ := d.Snapshot()
	if view.GetState() != migratedv1.MigrationState_MIGRATION_STATE_FAILED ||
		!strings.Contains(view.GetError().GetMessage(), "the destination QEMU has ended") ||
		!strings.Contains(view.GetError().GetRemedy(), "on the source") {
		t.Errorf("the migration is %v: %v", view.GetState(), view.GetError())
	}
	if l.filesStay() {
		t.Error("its files stay")
	}
	if _, err := run(t, d); err == nil || errors.Is(err, ErrNotRun) || errors.Is(err, errAskAgain) {
		t.Errorf("Run: %v; want another error than ErrNotRun", err)
	}
	expectDeleteRefused(t, "with its end undecided", d.Delete(t.Context()), "does not have all of its memory")
	if err := d.Abandon(t.Context()); err != nil {
		t.Errorf("it cannot be abandoned: %v", err)
	}
	if view, _ := d.Snapshot(); view.GetLocation() != migratedv1.Location_LOCATION_ENDED {
		t.Errorf("the abandoned VM is at %v: %v", view.GetLocation(), view.GetError())
	}
	if err := d.Delete(t.Context()); err != nil {
		t.Errorf("it cannot be deleted: %v", err)
	}
}

func TestKeptByAnotherVersion(t *testing.T) {
	l := leaveDestination(t, false)
	path := filepath.Join(l.dir, keptFacts)
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	newer := strings.Replace(string(text), `"version":1`, `"version":99`, 1)
	if err := os.WriteFile(path, []byte(newer), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = TakeUpDestination(t.Context(), DestinationConfig{Dir: l.dir, Log: slog.New(slog.DiscardHandler)})
	if err == nil || !strings.Contains(err.Error(), "version 99") || !l.filesStay() {
		t.Errorf("TakeUpDestination: %v; its files stay: %v", err, l.filesStay())
	}
}

// gone checks that QEMU has ended and that the files are gone.
func (l *left) gone(t *testing.T) {
	t.Helper()
	if err := l.vm.WaitExit(t.Context()); err != nil {
		t.Error(err)
	}
	if l.filesStay() {
		t.Error("its files stay")
	}
}
