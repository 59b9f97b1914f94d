// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/pkg/pagesrv"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// The source repeats the hand-over until it is answered. The record stays until the last page has left.
func TestHandOverIsRepeated(t *testing.T) {
	recorded := make(chan bool, 10)
	var s *stage
	s = newStage(t, t.Context(), func(attempt int) (*migratedv1.RunResponse, error) {
		recorded <- s.handedOver(t)
		if attempt < 4 {
			return nil, status.Error(codes.Unavailable, "a broken wire")
		}
		return runAtOnce(attempt)
	})
	s.source.Start()
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, "")
	if s.peer.runs != 4 || s.peer.bytes == 0 || s.peer.aborted {
		t.Errorf("%d hand-overs, %d bytes of device state, aborted %v", s.peer.runs, s.peer.bytes, s.peer.aborted)
	}
	for range 4 {
		if !<-recorded {
			t.Error("the VM was given away before that was written down")
		}
	}
	if s.handedOver(t) {
		t.Error("the record stays after the end")
	}
}

// A daemon that is killed at any moment near the end finds the record or the report when it is started again.
func TestReportedBeforeItIsForgotten(t *testing.T) {
	s := newStage(t, t.Context(), runAtOnce)
	var reported *migratedv1.Migration
	var recorded bool
	s.source.cfg.Report = func(source *Source) {
		reported = source.Report().GetMigration()
		_, recorded, _ = s.records.find(source.cfg.ID)
	}
	s.source.Start()
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, "")
	if reported.GetState() != migratedv1.MigrationState_MIGRATION_STATE_COMPLETED || !recorded {
		t.Errorf("it was reported as %v; recorded %t then", reported, recorded)
	}
	if _, found, err := s.records.find(s.source.cfg.ID); found || err != nil {
		t.Errorf("the record stays: %v", err)
	}
}

// A destination's promise that it never ran the VM gives the VM back to the source.
func TestNotRunGivesTheVMBack(t *testing.T) {
	s := newStage(t, t.Context(), func(attempt int) (*migratedv1.RunResponse, error) {
		if attempt == 1 {
			return nil, status.Error(codes.Unavailable, "a broken wire")
		}
		return nil, status.Error(codes.Aborted, "QEMU died")
	})
	s.source.Start()
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, "the VM runs on the source")
	if !s.vmRuns(t) {
		t.Error("the VM does not run")
	}
	if s.handedOver(t) {
		t.Error("the VM counts as handed over")
	}
}

// If the destination cannot tell whether the VM ran, the VM stays stopped and on record at the source, so that it does
// not run twice.
func TestUnknownFateLeavesTheVMStopped(t *testing.T) {
	for _, code := range []codes.Code{codes.NotFound, codes.FailedPrecondition} {
		t.Run(code.String(), func(t *testing.T) {
			s := newStage(t, t.Context(), func(int) (*migratedv1.RunResponse, error) {
				return nil, status.Error(code, "who knows")
			})
			s.source.Start()
			s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, "stopped on the source")
			if s.vmRuns(t) {
				t.Error("the VM runs, and may run on the destination, too")
			}
			if !s.handedOver(t) {
				t.Error("nothing keeps the VM from being continued")
			}
			again := NewSource(t.Context(), SourceConfig{
				ID: "m2", Spec: s.source.cfg.Spec, Pages: pagesrv.NewServer(pagesrv.Options{}), Records: s.records,
				Dial: s.source.cfg.Dial, Log: s.source.cfg.Log,
			})
			<-again.Done()
			if view, _ := again.Snapshot(); !strings.Contains(view.GetError().GetMessage(), "was handed over") {
				t.Errorf("a second migration of it is not refused for that: %v", view.GetError())
			}
		})
	}
}

// After the commit point neither a cancellation nor the end of the daemon continues the VM.
func TestCommittedVMStaysStopped(t *testing.T) {
	ctx, stop := context.WithCancelCause(t.Context())
	asked := make(chan struct{}, 100)
	s := newStage(t, ctx, func(int) (*migratedv1.RunResponse, error) {
		asked <- struct{}{}
		return nil, status.Error(codes.Unavailable, "a broken wire")
	})
	s.source.Start()
	<-asked
	<-asked
	if err := s.source.Cancel(); !errors.Is(err, ErrCommitted) {
		t.Errorf("Cancel: %v", err)
	}
	if view, _ := s.source.Snapshot(); view.GetState() != migratedv1.MigrationState_MIGRATION_STATE_HANDOVER {
		t.Errorf("state is %v while the hand-over is not answered", view.GetState())
	}
	stop(errors.New("the daemon was stopped"))
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_HANDOVER, "stopped on the source")
	if s.vmRuns(t) || !s.handedOver(t) {
		t.Error("the VM was given away and kept")
	}
}

// If the destination does not load the device state, the source continues the VM that it stopped.
func TestLoadErrorContinuesTheVM(t *testing.T) {
	s := newStage(t, t.Context(), runAtOnce)
	s.peer.load = func(context.Context) error { return status.Error(codes.FailedPrecondition, "QEMU was killed") }
	s.source.Start()
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, "the VM runs on the source")
	<-s.source.stopped // it was
	if s.peer.runs != 0 || !s.peer.aborted || !s.vmRuns(t) || s.handedOver(t) {
		t.Errorf("%d hand-overs, aborted %v", s.peer.runs, s.peer.aborted)
	}
}

// A cancellation while the VM stands still continues it.
func TestCancelWhileStopped(t *testing.T) {
	s := newStage(t, t.Context(), runAtOnce)
	s.peer.load = func(ctx context.Context) error {
		<-ctx.Done()
		return ctx.Err()
	}
	s.source.Start()
	<-s.source.stopped
	if err := s.source.Cancel(); err != nil {
		t.Fatal(err)
	}
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_CANCELLED, "the VM runs on the source")
	if s.peer.runs != 0 || !s.vmRuns(t) || s.handedOver(t) {
		t.Errorf("%d hand-overs", s.peer.runs)
	}
}

// A VM that somebody continues before the commit point is not handed over: it would run twice.
func TestContinuedVMIsNotHandedOver(t *testing.T) {
	s := newStage(t, t.Context(), runAtOnce)
	loaded := make(chan struct{})
	s.peer.load = func(ctx context.Context) error {
		close(loaded)
		<-ctx.Done() // keep loading until the source gives up
		return ctx.Err()
	}
	s.source.Start()
	<-loaded
	s.command(t, "cont", nil, nil)
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, "the VM runs on the source")
	view, _ := s.source.Snapshot()
	said := view.GetError()
	if !strings.Contains(said.GetMessage(), "somebody continued the VM") || said.GetRemedy() == "" {
		t.Errorf("it says %v", said)
	}
	if s.peer.runs != 0 || !s.vmRuns(t) || s.handedOver(t) {
		t.Errorf("%d hand-overs", s.peer.runs)
	}
}

// When somebody continues the source's VM after the switch, the source stops serving its pages: they are no longer
// those of the switch.
func TestContinuedVMIsNotServed(t *testing.T) {
	s := newStage(t, t.Context(), runAtOnce)
	s.peer.endless = true
	s.source.Start()
	for view, changed := s.source.Snapshot(); view.GetState() !=
		migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_ACTIVE; view, changed = s.source.Snapshot() {
		if Terminal(view.GetState()) {
			t.Fatal(view.GetError())
		}
		<-changed
	}
	page := filepath.Join(t.TempDir(), "page")
	if err := os.WriteFile(page, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	ram, err := pagesrv.OpenRAM([]pagesrv.Block{{ID: "ram0", Path: page, Size: 4096, PageSize: 4096}})
	if err != nil {
		t.Fatal(err)
	}
	defer ram.Close()
	offered := func() bool {
		export, err := s.pages.Offer("m1", "token", ram, func(context.Context) error { return nil })
		if err == nil {
			export.Withdraw()
		}
		return errors.Is(err, pagesrv.ErrOffered)
	}
	if !offered() {
		t.Fatal("the pages are not served after the switch")
	}
	s.continueAnyway(t)
	for deadline := time.Now().Add(2 * time.Minute); offered(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the pages of a running VM are served")
		}
	}
	for view, changed := s.source.Snapshot(); !strings.Contains(
		view.GetError().GetRemedy(), "both write to the same disks",
	); {
		if Terminal(view.GetState()) {
			t.Fatal(view)
		}
		<-changed
		view, changed = s.source.Snapshot()
	}
}

// A cancellation before the commit point wins.
func TestCancelBeforeCommit(t *testing.T) {
	s := newStage(t, t.Context(), runAtOnce)
	for view, changed := s.source.Snapshot(); !view.GetPrepared(); view, changed = s.source.Snapshot() {
		if Terminal(view.GetState()) {
			t.Fatal(view.GetError())
		}
		<-changed
	}
	if err := s.source.Cancel(); err != nil {
		t.Fatal(err)
	}
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_CANCELLED, "not touched")
	if s.peer.runs != 0 || !s.peer.aborted || !s.vmRuns(t) {
		t.Errorf("%d hand-overs, aborted %v", s.peer.runs, s.peer.aborted)
	}
}
