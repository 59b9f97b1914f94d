// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// expectDeleteRefused expects a refusal that contains words and has a remedy.
func expectDeleteRefused(t *testing.T, what string, err error, words string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), words) || Remedy(err) == "" {
		t.Errorf("%s: deleted with %v (%s)", what, err, Remedy(err))
	}
}

// TestDeleteSource: a source is not deleted while it is under way, nor while it is not decided where the VM is.
func TestDeleteSource(t *testing.T) {
	s := newStage(t, t.Context(), runAtOnce)
	expectDeleteRefused(t, "under way", s.source.Delete(t.Context()), "not over")
	if err := s.source.Cancel(); err != nil {
		t.Fatal(err)
	}
	<-s.source.Done()
	if err := s.source.Delete(t.Context()); err != nil || !s.source.Deleted() {
		t.Errorf("when it was cancelled: %v", err)
	}

	s = committed(t)
	expectDeleteRefused(t, "handed over", s.source.Delete(t.Context()), "not decided where it is")
	if !s.handedOver(t) {
		t.Error("what keeps the VM from being continued is gone")
	}
	expectDeleteRefused(t, "to make room", s.source.Needed(), "not decided where it is")
	s.peer.setWatch(unreachable)
	if err := s.source.FallBack(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.source.Needed(), s.source.Delete(t.Context())); err != nil {
		t.Errorf("when its operator has said where it is: %v", err)
	}
}

// TestDeleteKeepsWhatProtectsAKeptQEMU: without its record, a QEMU that is kept would be taken for the VM.
func TestDeleteKeepsWhatProtectsAKeptQEMU(t *testing.T) {
	s := newStageWith(t, t.Context(), &peer{run: runAtOnce, spec: &migratedv1.MigrationSpec{KeepSource: true}})
	s.source.Start()
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, "")
	expectDeleteRefused(t, "with its QEMU", s.source.Delete(t.Context()), "keeps it from being taken for the VM")
	if !s.handedOver(t) {
		t.Error("the record is gone")
	}
	if err := s.qemu.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = s.qemu.Wait() // it was killed
	if err := s.source.Delete(t.Context()); err != nil {
		t.Errorf("without its QEMU: %v", err)
	}
	s.noRecord(t)
}

// TestDeleteDestinationThatWasNotBegun: its source cannot have handed the VM over, so it may be deleted.
func TestDeleteDestinationThatWasNotBegun(t *testing.T) {
	d := NewDestination(t.Context(), DestinationConfig{
		Request: &migratedv1.PrepareIncomingRequest{Id: "m"}, Dir: t.TempDir(), Log: slog.New(slog.DiscardHandler),
	})
	expectDeleteRefused(t, "under way", d.Delete(t.Context()), "not over")
	d.mu.Lock()
	d.giveUp(errors.New("the test says so"))
	d.mu.Unlock()
	if err := d.Delete(t.Context()); err != nil || !d.Deleted() {
		t.Errorf("given up: %v", err)
	}
}

// TestDeleteWaitsForTheSourceToHear: the source may still send Run, and has to be told that the VM never ran here.
func TestDeleteWaitsForTheSourceToHear(t *testing.T) {
	d := NewDestination(t.Context(), DestinationConfig{
		Request: &migratedv1.PrepareIncomingRequest{Id: "m", PageAddresses: []string{"192.0.2.1:7600"}}, Dir: t.TempDir(),
		Dial: noSource, Log: slog.New(slog.DiscardHandler),
	})
	d.update(func(m *migratedv1.Migration) { m.StartTime = timestamppb.Now() })
	d.mu.Lock()
	d.giveUp(errors.New("the test says so"))
	d.mu.Unlock()
	expectDeleteRefused(t, "unheard", d.Delete(t.Context()), "does not know yet that the migration is over")
	if err := d.Abort("so the source says"); err != nil {
		t.Fatal(err)
	}
	if err := d.Delete(t.Context()); err != nil {
		t.Errorf("when the source has given up: %v", err)
	}
}

// TestDeleteCompletedDestination: the files from which a restarted daemon answers the source are removed only after the
// source was told.
func TestDeleteCompletedDestination(t *testing.T) {
	l := leaveDestination(t, true)
	h := l.kept.header()
	at := time.Unix(1_700_000_000, 5)
	h.toldToRun.Store(1)
	h.resumed.Store(at.UnixNano())
	h.started.Store(at.Add(-time.Second).UnixNano())
	h.over.Store(at.Add(time.Minute).UnixNano())
	h.filled.Store(1)
	d := l.takeUp(t)
	<-d.Done()
	view, _ := d.Snapshot()
	if !view.GetSwitchTime().AsTime().Equal(at) || !view.GetStartTime().AsTime().Equal(at.Add(-time.Second)) ||
		!view.GetEndTime().AsTime().Equal(at.Add(time.Minute)) || view.GetDestinationQemu().GetPid() != uint32(l.pid) {
		t.Errorf("it is shown as %v", view)
	}
	expectDeleteRefused(t, "unheard", d.Delete(t.Context()), "does not know yet that the migration is over")
	if !l.filesStay() {
		t.Error("its word is gone")
	}
	d.Heard()
	if err := d.Delete(t.Context()); err != nil || l.filesStay() {
		t.Errorf("when the source has heard: %v; its files stay: %t", err, l.filesStay())
	}
}

// TestDeleteLeftover: it is not known what a damaged file is about.
func TestDeleteLeftover(t *testing.T) {
	l := NewLeftover("m", migratedv1.MigrationRole_MIGRATION_ROLE_SOURCE,
		withRemedy(errors.New("half a file"), "look at it"))
	expectDeleteRefused(t, "damaged", l.Delete(t.Context()), "half a file")
}
