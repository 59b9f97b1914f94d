// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// TestFallBackAsksTheDestination: if the destination answers, its answer decides whether the VM may be continued here.
// After a refusal the source is as before: it stands still, and serves its memory.
func TestFallBackAsksTheDestination(t *testing.T) {
	for name, c := range map[string]struct {
		answer *migratedv1.WatchIncomingResponse
		words  string // of the refusal; empty: it falls back
	}{
		"the VM runs there": {&migratedv1.WatchIncomingResponse{
			State:    migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_ACTIVE,
			Location: migratedv1.Location_LOCATION_DESTINATION,
		}, "has the VM"},
		"its daemon cannot go on": {&migratedv1.WatchIncomingResponse{
			State:    migratedv1.MigrationState_MIGRATION_STATE_FAILED,
			Location: migratedv1.Location_LOCATION_DESTINATION,
		}, "has the VM"},
		"all memory is there": {&migratedv1.WatchIncomingResponse{
			State: migratedv1.MigrationState_MIGRATION_STATE_COMPLETED,
		}, "has the whole VM"},
		"its guest powered off": {&migratedv1.WatchIncomingResponse{
			State:    migratedv1.MigrationState_MIGRATION_STATE_FAILED,
			Location: migratedv1.Location_LOCATION_ENDED,
			Error:    &migratedv1.MigrationError{Message: "it powered off", Reason: migratedv1.Reason_REASON_GUEST_SHUTDOWN},
		}, "has ended there"},
		"its QEMU died": {&migratedv1.WatchIncomingResponse{
			State:    migratedv1.MigrationState_MIGRATION_STATE_FAILED,
			Location: migratedv1.Location_LOCATION_NOWHERE,
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			s, asked := unanswered(t)
			s.peer.setWatch(func(stream grpc.ServerStreamingServer[migratedv1.WatchIncomingResponse]) error {
				return stream.Send(c.answer)
			})
			s.source.Start()
			<-asked
			err := s.source.FallBack(t.Context())
			if c.words == "" {
				if err != nil || !s.vmRuns(t) {
					t.Errorf("it does not fall back: %v", err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.words) || Remedy(err) == "" {
				t.Errorf("it falls back: %v", err)
			}
			if view, _ := s.source.Snapshot(); Terminal(view.GetState()) || !s.handedOver(t) || s.vmRuns(t) {
				t.Errorf("it is not as before: %v", view)
			}
		})
	}
}

// TestFallBackWhereTheDestinationDoesNotSay: a destination that answers, but cannot read what it kept, is not gone.
func TestFallBackWhereTheDestinationDoesNotSay(t *testing.T) {
	s, asked := unanswered(t)
	s.peer.setWatch(func(grpc.ServerStreamingServer[migratedv1.WatchIncomingResponse]) error {
		return status.Error(codes.Unknown, "a later version wrote it")
	})
	s.source.Start()
	<-asked
	err := s.source.FallBack(t.Context())
	if err == nil || !strings.Contains(err.Error(), "a later version wrote it") || Remedy(err) == "" {
		t.Errorf("it falls back: %v", err)
	}
	if view, _ := s.source.Snapshot(); Terminal(view.GetState()) || !s.handedOver(t) || s.vmRuns(t) {
		t.Errorf("it is not as before: %v", view)
	}
}

// TestFallBackThatFails: QEMU refuses to continue the VM, as something else has a lock on its image. The migration is
// not shown as one that fell back until the VM runs.
func TestFallBackThatFails(t *testing.T) {
	image := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(image, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	asked := make(chan struct{}, 100)
	s := newStageWith(t, t.Context(), &peer{watch: unreachable, run: func(int) (*migratedv1.RunResponse, error) {
		asked <- struct{}{}
		return nil, status.Error(codes.Unavailable, "a broken wire")
	}}, "-blockdev", "driver=file,node-name=disk,filename="+image, "-device", "virtio-blk-pci,drive=disk")
	s.source.Start()
	<-asked
	holder, err := lockImage(image)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.source.FallBack(t.Context()); err == nil || Remedy(err) == "" {
		t.Errorf("it falls back: %v", err)
	}
	view, _ := s.source.Snapshot()
	if view.GetError().GetReason() == migratedv1.Reason_REASON_FELL_BACK || view.GetError().GetRemedy() == "" ||
		strings.Contains(view.GetError().GetMessage(), errFallBack.Error()) || !s.handedOver(t) || s.vmRuns(t) {
		t.Errorf("it is shown as %v", view)
	}
	if err := holder.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.source.FallBack(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.givenBack(t)
	if view, _ := s.source.Snapshot(); view.GetError().GetReason() != migratedv1.Reason_REASON_FELL_BACK {
		t.Errorf("it is shown as %v", view)
	}
}

// TestDestinationWhoseDaemonCannotGoOn: the source keeps serving the memory of a VM whose QEMU lives at the
// destination, although the daemon there has given up. It goes on when that daemon is started again.
func TestDestinationWhoseDaemonCannotGoOn(t *testing.T) {
	s := newStage(t, t.Context(), runAtOnce)
	s.peer.setWatch(func(stream grpc.ServerStreamingServer[migratedv1.WatchIncomingResponse]) error {
		return stream.Send(&migratedv1.WatchIncomingResponse{
			State:    migratedv1.MigrationState_MIGRATION_STATE_FAILED,
			Location: migratedv1.Location_LOCATION_DESTINATION,
			Error:    &migratedv1.MigrationError{Message: "no descriptor is left", Remedy: "close some"},
		})
	})
	s.source.Start()
	view := s.shows(t, "no descriptor is left", "close some")
	if view.GetState() != migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_PAUSED ||
		view.GetLocation() != migratedv1.Location_LOCATION_DESTINATION {
		t.Errorf("it is %v, the VM %v", view.GetState(), view.GetLocation())
	}
	s.peer.setWatch(nil) // completed
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, "")
	if view, _ := s.source.Snapshot(); view.GetError() != nil {
		t.Errorf("it is completed: %v", view.GetError())
	}
	s.noRecord(t)
}
