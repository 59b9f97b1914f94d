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

// endQEMU ends the stage's QEMU behind the source's back.
func (s *stage) endQEMU(t *testing.T) {
	t.Helper()
	if err := s.qemu.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = s.qemu.Wait() // it was killed
}

// shows waits until the source shows an error with all of the words, and returns the migration then.
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

// TestSourceQEMUEndsAfterTheSwitch: memory is lost, which its operator is told. Nobody is told to continue the VM here.
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

// TestSourceQEMUEndsBeforeTheAnswer: where the VM is is not said before the destination has said so.
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

// TestBothQEMUsEnd: a destination that gives the VM back gives back one that is not there any more.
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

// TestWhatAPageServerSaysOfADeadQEMU: text alone crosses the network.
func TestWhatAPageServerSaysOfADeadQEMU(t *testing.T) {
	lost := func(code codes.Code, err error) error {
		return fmt.Errorf("bulk lane: %w: %w", postcopy.ErrLaneLost, status.Error(code, err.Error()))
	}
	for name, c := range map[string]struct {
		err  error
		want bool
	}{
		"gone":              {lost(codes.DataLoss, fmt.Errorf("%w: %w", pagesrv.ErrRAM, pagesrv.ErrProcessGone)), true},
		"cannot be read":    {lost(codes.DataLoss, pagesrv.ErrRAM), false},
		"another word":      {lost(codes.Aborted, pagesrv.ErrProcessGone), false},
		"the network":       {lost(codes.Unavailable, errors.New("reset")), false},
		"not of the source": {fmt.Errorf("%w: %w", postcopy.ErrNoMemory, pagesrv.ErrProcessGone), false},
	} {
		if got := sourceQEMUGone(c.err); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// TestWhatEndsWithTheSourceQEMUComesFirst: where all of it does, nothing is first.
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
		soonest(blocks, c.source)
		for i, b := range blocks {
			if b.First != c.want[i] {
				t.Errorf("%s: block %d is first: %v", name, i, b.First)
			}
		}
	}
}

// TestSourceThatOffersNothing: a daemon that was started again after its QEMU had ended is reachable, but has no pages.
func TestSourceThatOffersNothing(t *testing.T) {
	for name, c := range map[string]struct {
		code codes.Code
		text string
		want string
	}{
		"refused":       {codes.PermissionDenied, pagesrv.ErrRefused.Error(), "migrated status m1"},
		"not authentic": {codes.PermissionDenied, "another peer", "reachable"},
		"unreachable":   {codes.Unavailable, "connection refused", "reachable"},
	} {
		failure := fmt.Errorf("page server: %w", &peerError{status.New(c.code, c.text)})
		if remedy := Remedy(noLanes("m1", []error{failure})); !strings.Contains(remedy, c.want) {
			t.Errorf("%s: %s", name, remedy)
		}
	}
}
