// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/internal/qemu"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// setWatch sets how the peer answers WatchIncoming after the VM was handed over.
func (p *peer) setWatch(watch func(grpc.ServerStreamingServer[migratedv1.WatchIncomingResponse]) error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.watch = watch
}

// unreachable is the answer of a destination that is gone.
func unreachable(grpc.ServerStreamingServer[migratedv1.WatchIncomingResponse]) error {
	return status.Error(codes.Unavailable, "no route to host")
}

// TestReleaseWhereTheDestinationKnowsNothing: a destination that has forgotten the migration does not end it. The
// operator may.
func TestReleaseWhereTheDestinationKnowsNothing(t *testing.T) {
	s := newStage(t, t.Context(), runAtOnce)
	s.peer.setWatch(func(grpc.ServerStreamingServer[migratedv1.WatchIncomingResponse]) error {
		return status.Error(codes.NotFound, "unheard of")
	})
	s.source.Start()
	view := s.shows(t, "knows nothing of it any more",
		"migrated release m1 --vm-is-at-destination", "migrated fallback m1")
	if view.GetState() != migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_PAUSED ||
		view.GetLocation() != migratedv1.Location_LOCATION_UNKNOWN ||
		view.GetError().GetReason() != migratedv1.Reason_REASON_MIGRATION_UNKNOWN {
		t.Errorf("it is %v, the VM %v: %v", view.GetState(), view.GetLocation(), view.GetError())
	}
	if err := s.source.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, "an operator declared")
	if view, _ := s.source.Snapshot(); view.GetLocation() != migratedv1.Location_LOCATION_DESTINATION ||
		view.GetError().GetReason() != migratedv1.Reason_REASON_RELEASED {
		t.Errorf("the VM is %v: %v", view.GetLocation(), view.GetError())
	}
	if err := s.qemu.Wait(); err != nil {
		t.Errorf("the source's QEMU: %v", err)
	}
	s.noRecord(t)
}

// TestReleaseRemovesTheMemorysFile: nobody needs the file of a released VM's memory. It would take memory of this host
// until somebody found it.
func TestReleaseRemovesTheMemorysFile(t *testing.T) {
	s := committed(t)
	s.peer.setWatch(unreachable)
	vm, err := qemu.Attach(t.Context(), s.vm)
	if err != nil {
		t.Fatal(err)
	}
	files := s.source.ramFilesOf(vm)
	if err := vm.Close(); err != nil || len(files) != 1 {
		t.Fatalf("files of its memory: %v, %v", files, err)
	}
	if err := s.source.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	view, _ := s.source.Snapshot()
	if _, err := os.Stat(files[0].Path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the file of its memory: %v; it says %q", err, view.GetRamFiles())
	}
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, "its QEMU on the source has ended")
	s.noRecord(t)
}

// TestReleaseKeepsWhatProtectsAKeptQEMU: the QEMU of a released VM that its operator keeps is not taken for the VM.
func TestReleaseKeepsWhatProtectsAKeptQEMU(t *testing.T) {
	s := committed(t)
	s.peer.setWatch(unreachable)
	s.source.cfg.Spec.KeepSource = true
	if err := s.source.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, "its QEMU on the source was kept")
	if rec, found, err := s.records.find("m1"); !found || !rec.Completed || err != nil || s.vmRuns(t) {
		t.Errorf("the record: %t, %v, %v", found, rec, err)
	}
	expectDeleteRefused(t, "with its QEMU", s.source.Delete(t.Context()), "keeps it from being taken for the VM")
	cfg := s.takeUpConfig()
	cfg.ID, cfg.Spec = "m2", s.source.cfg.Spec
	again := NewSource(t.Context(), cfg)
	again.Start()
	<-again.Done()
	if view, _ := again.Snapshot(); !strings.Contains(view.GetError().GetMessage(), "only kept for its memory") {
		t.Errorf("a second migration of it: %v, %v", view.GetState(), view.GetError())
	}
}

// TestReleaseLeavesAContinuedVMAlone: a VM that somebody has continued here is in use, also where its QEMU is kept.
func TestReleaseLeavesAContinuedVMAlone(t *testing.T) {
	for name, keep := range map[string]bool{"ended": false, "kept": true} {
		t.Run(name, func(t *testing.T) {
			s := committed(t)
			s.peer.setWatch(unreachable)
			s.source.cfg.Spec.KeepSource = keep
			s.continueAnyway(t)
			if err := s.source.Release(t.Context()); err == nil || !strings.Contains(err.Error(), "is not stopped") {
				t.Errorf("it is released: %v", err)
			}
			if rec, found, err := s.records.find("m1"); !found || rec.Completed || err != nil || !s.vmRuns(t) {
				t.Errorf("the record: %t, %v, %v", found, rec, err)
			}
		})
	}
}

// TestReleaseIsRefused: Release fails before the commit point, and if the destination answers that it does not have all
// of the VM.
func TestReleaseIsRefused(t *testing.T) {
	for name, c := range map[string]struct {
		answer *migratedv1.WatchIncomingResponse
		words  string
	}{
		"memory is missing": {&migratedv1.WatchIncomingResponse{
			State:    migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_ACTIVE,
			Location: migratedv1.Location_LOCATION_DESTINATION,
		}, "needs memory"},
		"its QEMU has ended": {&migratedv1.WatchIncomingResponse{
			State:    migratedv1.MigrationState_MIGRATION_STATE_FAILED,
			Location: migratedv1.Location_LOCATION_NOWHERE,
		}, "has not got the VM"},
	} {
		t.Run(name, func(t *testing.T) {
			s, asked := unanswered(t)
			s.peer.setWatch(func(stream grpc.ServerStreamingServer[migratedv1.WatchIncomingResponse]) error {
				return stream.Send(c.answer)
			})
			if err := s.source.Release(t.Context()); err == nil || Remedy(err) == "" {
				t.Errorf("before the commit point: %v", err)
			}
			s.source.Start()
			<-asked
			if err := s.source.Release(t.Context()); err == nil || !strings.Contains(err.Error(), c.words) || Remedy(err) == "" {
				t.Errorf("it is released: %v", err)
			}
			if !s.handedOver(t) {
				t.Error("the record is gone")
			}
		})
	}
}

// TestEndedVMIsNotContinued: a destination reports a VM that ended by itself as FAILED with a reason, which sources of
// any version understand.
func TestEndedVMIsNotContinued(t *testing.T) {
	s := newStage(t, t.Context(), runAtOnce)
	s.peer.setWatch(func(stream grpc.ServerStreamingServer[migratedv1.WatchIncomingResponse]) error {
		return stream.Send(&migratedv1.WatchIncomingResponse{
			State:    migratedv1.MigrationState_MIGRATION_STATE_FAILED,
			Location: migratedv1.Location_LOCATION_ENDED,
			Error:    &migratedv1.MigrationError{Message: "it powered off", Reason: migratedv1.Reason_REASON_GUEST_SHUTDOWN},
		})
	})
	s.source.Start()
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_ENDED, "its guest powered off")
	if err := s.source.FallBack(t.Context()); err == nil {
		t.Error("its old memory is run")
	}
	if err := s.qemu.Wait(); err != nil {
		t.Errorf("the source's QEMU: %v", err)
	}
	s.noRecord(t)
}

// TestDaemonThatEndsHasNotFailed: when a daemon ends after the commit point, the migration is not shown as failed. The
// next daemon goes on with it.
func TestDaemonThatEndsHasNotFailed(t *testing.T) {
	ctx, stop := context.WithCancelCause(t.Context())
	s := newStage(t, ctx, runAtOnce)
	s.peer.endless = true
	s.source.Start()
	for view, changed := s.source.Snapshot(); view.GetState() !=
		migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_ACTIVE; view, changed = s.source.Snapshot() {
		if Terminal(view.GetState()) {
			t.Fatal(view.GetError())
		}
		<-changed
	}
	stop(errors.New("the daemon was stopped"))
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_ACTIVE, "start the source's daemon again")
	if view, _ := s.source.Snapshot(); view.GetLocation() != migratedv1.Location_LOCATION_DESTINATION ||
		view.GetError().GetReason() != migratedv1.Reason_REASON_DAEMON_ENDED {
		t.Errorf("the VM is %v: %v", view.GetLocation(), view.GetError())
	}
	if !s.handedOver(t) {
		t.Error("the record is gone")
	}
}

// TestReasonsCrossTheNetwork: a source reports an error of its destination with the destination's reason.
func TestReasonsCrossTheNetwork(t *testing.T) {
	for _, c := range []struct {
		err  error
		code codes.Code
		want migratedv1.Reason
	}{
		{errQEMUGone, codes.FailedPrecondition, migratedv1.Reason_REASON_DESTINATION_QEMU_ENDED},
		{errors.New("no room"), codes.ResourceExhausted, migratedv1.Reason_REASON_DESTINATION_REFUSED},
		{errors.New("no route"), codes.Unavailable, migratedv1.Reason_REASON_UNREACHABLE},
		{errPausedSince, codes.FailedPrecondition, migratedv1.Reason_REASON_INTERFERED},
	} {
		if got := reasonOf(fromPeer("do it", "there", ToStatus(c.code, c.err))); got != c.want {
			t.Errorf("%v: %v instead of %v", c.err, got, c.want)
		}
	}
}
