// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/pkg/pagesrv"
	"github.com/migrated-vm/migrated/pkg/postcopy"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// endQEMU kills the stage's QEMU without the source's doing.
func (s *stage) endQEMU(t *testing.T) {
	t.Helper()
	if err := s.qemu.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = s.qemu.Wait() // it was killed
}

// shows waits until the source shows an error with all of the words, and returns the migration.
func (s *stage) shows(t *testing.T, words ...string) *migratedv1.Migration {
	t.Helper()
	for {
		view, changed := s.source.Snapshot()
		shown := view.GetError().GetMessage() + view.GetError().GetRemedy() + view.GetError().GetVmStatus()
		missing := 0
		for _, word := range words {
			if !strings.Contains(shown, word) {
				missing++
			}
		}
		if missing == 0 {
			return view
		}
		select {
		case <-changed:
		case <-t.Context().Done():
			t.Fatalf("%v, %q; wanted %q", view.GetState(), shown, words)
		}
	}
}

// TestSourceQEMUEndsAfterTheSwitch: the operator is told that memory is lost. No remedy says to continue the VM here.
func TestSourceQEMUEndsAfterTheSwitch(t *testing.T) {
	switched := make(chan struct{})
	s := newStage(t, t.Context(), func(int) (*migratedv1.RunResponse, error) {
		close(switched)
		return runAtOnce(1)
	})
	s.peer.endless = true
	s.source.Start()
	<-switched
	s.endQEMU(t)
	view := s.shows(t, "QEMU has ended", "end the VM there", "migrated status m1", "the VM is on the destination")
	if Terminal(view.GetState()) {
		t.Errorf("it is %v: what is in files may come yet", view.GetState())
	}
	s.source.cancel(errors.New("the daemon ends"))
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, endedStatus)
	s.noRecord(t)
}

// TestSourceQEMUEndsBeforeTheAnswer: the source does not say where the VM is before the destination has answered.
func TestSourceQEMUEndsBeforeTheAnswer(t *testing.T) {
	asked, answer := make(chan struct{}), make(chan struct{})
	s := newStage(t, t.Context(), func(int) (*migratedv1.RunResponse, error) {
		close(asked)
		<-answer
		return runAtOnce(1)
	})
	s.peer.endless = true
	s.source.Start()
	<-asked
	s.endQEMU(t)
	s.shows(t, "QEMU has ended", "has not answered yet")
	close(answer)
	s.shows(t, "QEMU has ended", "the VM is on the destination")
	s.source.cancel(errors.New("the daemon ends"))
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, endedStatus)
}

// TestBothQEMUsEnd: the destination gives back a VM whose source QEMU has ended, too.
func TestBothQEMUsEnd(t *testing.T) {
	for _, code := range []codes.Code{codes.Aborted, codes.NotFound} {
		t.Run(code.String(), func(t *testing.T) {
			var s *stage
			s = newStage(t, t.Context(), func(int) (*migratedv1.RunResponse, error) {
				s.endQEMU(t)
				return nil, status.Error(code, "QEMU died")
			})
			s.source.Start()
			s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, endedStatus)
			if view, _ := s.source.Snapshot(); strings.Contains(view.GetError().GetRemedy(), "fallback") {
				t.Errorf("its operator is told: %s", view.GetError().GetRemedy())
			}
			s.noRecord(t)
		})
	}
}

// said returns a page server's status with a reason. Its text must not matter.
func said(t *testing.T, code codes.Code, text string, reason migratedv1.Reason) *status.Status {
	t.Helper()
	st, err := status.New(code, text).WithDetails(&migratedv1.MigrationError{Reason: reason})
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// TestWhatAPageServerSaysOfADeadQEMU: the reason decides, and only if the source says it.
func TestWhatAPageServerSaysOfADeadQEMU(t *testing.T) {
	const gone = migratedv1.Reason_REASON_SOURCE_QEMU_ENDED
	lost := func(code codes.Code, text string, reason migratedv1.Reason) error {
		return fmt.Errorf("bulk lane: %w: %w", postcopy.ErrLaneLost, said(t, code, text, reason).Err())
	}
	for name, c := range map[string]struct {
		err  error
		want bool
	}{
		"gone": {lost(codes.DataLoss, "it is", gone), true},
		"another reason": {
			lost(codes.DataLoss, pagesrv.ErrProcessGone.Error(), migratedv1.Reason_REASON_PAGES_REFUSED), false,
		},
		"the text alone": {
			fmt.Errorf("%w: %w", postcopy.ErrLaneLost, status.Error(codes.DataLoss, pagesrv.ErrProcessGone.Error())), false,
		},
		"the network":       {fmt.Errorf("%w: %w", postcopy.ErrLaneLost, status.Error(codes.Unavailable, "reset")), false},
		"not of the source": {fmt.Errorf("%w: %w", postcopy.ErrNoMemory, pagesrv.ErrProcessGone), false},
	} {
		if got := sourceQEMUGone(c.err); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// TestWhatEndsWithTheSourceQEMUComesFirst: memory that ends with the source's QEMU is fetched first. If all of it
// does, none is first.
func TestWhatEndsWithTheSourceQEMUComesFirst(t *testing.T) {
	file, private := &migratedv1.RamBlock{File: "a file"}, &migratedv1.RamBlock{}
	for name, c := range map[string]struct {
		source []*migratedv1.RamBlock
		want   []bool
	}{
		"RAM in a file": {[]*migratedv1.RamBlock{private, file, private}, []bool{true, false, true}},
		"all private":   {[]*migratedv1.RamBlock{private, private}, []bool{false, false}},
		"all in files":  {[]*migratedv1.RamBlock{file}, []bool{false}},
	} {
		blocks := make([]postcopy.Block, len(c.source))
		fetchPrivateFirst(blocks, c.source)
		for i, b := range blocks {
			if b.First != c.want[i] {
				t.Errorf("%s: block %d is first: %v", name, i, b.First)
			}
		}
	}
}

// TestSourceThatOffersNothing: a daemon that was restarted after its QEMU had ended is reachable and has no pages.
func TestSourceThatOffersNothing(t *testing.T) {
	for name, c := range map[string]struct {
		status *status.Status
		want   string
	}{
		"refused": {
			said(t, codes.PermissionDenied, "no", migratedv1.Reason_REASON_PAGES_REFUSED), "migrated status m1",
		},
		"not authentic": {status.New(codes.PermissionDenied, pagesrv.ErrRefused.Error()), "reachable"},
		"unreachable":   {status.New(codes.Unavailable, "connection refused"), "reachable"},
	} {
		failure := fmt.Errorf("page server: %w", &peerError{c.status})
		if remedy := Remedy(noLanesError("m1", []error{failure})); !strings.Contains(remedy, c.want) {
			t.Errorf("%s: %s", name, remedy)
		}
	}
}
