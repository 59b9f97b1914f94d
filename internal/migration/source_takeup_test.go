// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qmp"
	"github.com/migrated-vm/migrated/pkg/pagesrv"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// takeUp does what a restarted daemon does with the record that the stage's source left.
func (s *stage) takeUp(t *testing.T) {
	t.Helper()
	s.takeUpIn(t, t.Context())
}

// takeUpIn does so in a daemon that lives as long as ctx.
func (s *stage) takeUpIn(t *testing.T, ctx context.Context) { //nolint:revive // t first, as everywhere
	t.Helper()
	records, err := s.records.All()
	if err != nil || len(records) != 1 {
		t.Fatalf("records: %v, %v", records, err)
	}
	if s.source, err = TakeUpSource(ctx, s.takeUpConfig(), records[0]); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.source.cancel(errors.New("the test is over"))
		<-s.source.Done()
	})
}

// takeUpConfig returns the configuration of a source in a daemon that was started again.
func (s *stage) takeUpConfig() SourceConfig {
	cfg := s.source.cfg
	cfg.ID, cfg.Spec, cfg.Pages = "", nil, pagesrv.NewServer(pagesrv.Options{})
	return cfg
}

// unanswered returns a stage whose destination does not answer Run. asked is closed when it is first told to run the
// VM.
func unanswered(t *testing.T) (s *stage, asked <-chan struct{}) {
	t.Helper()
	told := make(chan struct{})
	return newStage(t, t.Context(), func(attempt int) (*migratedv1.RunResponse, error) {
		if attempt == 1 {
			close(told)
		}
		return nil, status.Error(codes.Unavailable, "a broken wire")
	}), told
}

// committed returns a stage whose source ended after the commit point, with its hand-over unanswered.
func committed(t *testing.T) *stage {
	t.Helper()
	s, asked := unanswered(t)
	s.source.Start()
	<-asked
	s.source.cancel(errors.New("the daemon ends"))
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, "the daemon ends")
	if !s.handedOver(t) || s.vmRuns(t) {
		t.Fatal("the VM is not handed over")
	}
	return s
}

func TestTakenUpSourceRepeatsTheHandOver(t *testing.T) {
	s := committed(t)
	s.peer.run = runAtOnce
	s.takeUp(t)
	if err := s.source.Cancel(); err == nil {
		t.Error("it can be cancelled after the commit point")
	}
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, "")
	if err := s.qemu.Wait(); err != nil {
		t.Errorf("the source's QEMU: %v", err)
	}
	s.noRecord(t)
}

// All memory had left before the daemon ended. The QEMU that is no longer needed had quit, or had not.
func TestTakenUpSourceWasComplete(t *testing.T) {
	for name, quit := range map[string]bool{"QEMU has quit": true, "QEMU is left": false} {
		t.Run(name, func(t *testing.T) {
			s := committed(t)
			if err := s.records.Complete("m1", migratedv1.Reason_REASON_UNSPECIFIED, nil); err != nil {
				t.Fatal(err)
			}
			if quit {
				if err := s.qemu.Process.Kill(); err != nil {
					t.Fatal(err)
				}
				_ = s.qemu.Wait() // it was killed
			}
			s.takeUp(t)
			s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, "")
			if !quit {
				if err := s.qemu.Wait(); err != nil {
					t.Errorf("the source's QEMU: %v", err)
				}
			}
			s.noRecord(t)
		})
	}
}

// A QEMU that runs again is the VM, whatever the record says.
func TestTakenUpSourceWasCompleteAndContinued(t *testing.T) {
	s := committed(t)
	if err := s.records.Complete("m1", migratedv1.Reason_REASON_UNSPECIFIED, nil); err != nil {
		t.Fatal(err)
	}
	s.continueAnyway(t)
	s.takeUp(t)
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, "")
	if !s.vmRuns(t) {
		t.Error("the VM was ended")
	}
	s.noRecord(t)
}

// A daemon that cannot open the VM's memory says that the next one can go on.
func TestTakenUpSourceCannotOpenTheMemory(t *testing.T) {
	s := committed(t)
	if err := s.records.change("m1", func(rec *Record) { rec.Blocks[0].Addr++ }); err != nil {
		t.Fatal(err)
	}
	s.takeUp(t)
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, "restart this daemon: it goes on")
	if !s.handedOver(t) {
		t.Error("the record is gone")
	}
	if err := s.records.change("m1", func(rec *Record) { rec.Blocks[0].Addr-- }); err != nil {
		t.Fatal(err)
	}
	s.peer.run = runAtOnce
	s.takeUp(t)
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, "")
}

func TestTakenUpSourceIsGivenTheVMBack(t *testing.T) {
	s := committed(t)
	s.peer.run = func(int) (*migratedv1.RunResponse, error) { return nil, status.Error(codes.Aborted, "QEMU died") }
	s.takeUp(t)
	s.givenBack(t)
}

// The operator continued the VM: it is the VM again, and its pages are not served.
func TestTakenUpSourceThatSomebodyContinued(t *testing.T) {
	s := committed(t)
	s.continueAnyway(t)
	s.takeUp(t)
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, "somebody continued the VM")
	if !s.vmRuns(t) || s.source.export != nil {
		t.Errorf("it runs: %v; offered: %v", s.vmRuns(t), s.source.export)
	}
	s.noRecord(t)
}

func TestTakenUpSourceWhoseQEMUIsGone(t *testing.T) {
	s := committed(t)
	if err := s.qemu.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = s.qemu.Wait() // it was killed
	s.takeUp(t)
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, "is gone")
	s.noRecord(t)
}

// continueAnyway continues a VM that was handed over, as somebody else would: QEMU refuses, until the lock is removed.
func (s *stage) continueAnyway(t *testing.T) {
	t.Helper()
	client, err := qmp.Dial(t.Context(), s.other)
	if err != nil {
		t.Fatal(err)
	}
	if err := client.Do(t.Context(), "cont", nil, nil); !errors.Is(err, qmp.ErrGeneric) {
		t.Errorf("continue a VM that was handed over: %v", err)
	}
	node := map[string]string{"node-name": qemu.ContLockNode}
	err = errors.Join(client.Do(t.Context(), "blockdev-del", node, nil), client.Do(t.Context(), "cont", nil, nil))
	if err := errors.Join(err, client.Disconnect()); err != nil {
		t.Fatal(err)
	}
}

func TestFallBack(t *testing.T) {
	s := committed(t)
	s.peer.setWatch(unreachable)
	if err := s.source.FallBack(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.givenBack(t)
	if err := s.source.FallBack(t.Context()); err == nil {
		t.Error("a VM that is here again falls back")
	}
}

// FallBack first ends a hand-over that is being repeated.
func TestFallBackEndsTheHandOver(t *testing.T) {
	asked := make(chan struct{}, 100)
	s := newStage(t, t.Context(), func(int) (*migratedv1.RunResponse, error) {
		asked <- struct{}{}
		return nil, status.Error(codes.Unavailable, "a broken wire")
	})
	s.peer.setWatch(unreachable)
	s.source.Start()
	<-asked
	if err := s.source.FallBack(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !s.vmRuns(t) {
		t.Error("the VM does not run")
	}
	s.noRecord(t)
}

func TestFallBackIsRefused(t *testing.T) {
	s := newStage(t, t.Context(), runAtOnce)
	if err := s.source.FallBack(t.Context()); err == nil || !strings.Contains(err.Error(), "not been handed over") {
		t.Errorf("before the commit point: %v", err)
	}
	s.source.Start()
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, "")
	if err := s.source.FallBack(t.Context()); err == nil ||
		!strings.Contains(err.Error(), "the whole VM is at the destination") {
		t.Errorf("after the end: %v", err)
	}
}

// givenBack waits for the end of a migration that failed, and fails the test unless the VM runs at the source again and
// no record is left.
func (s *stage) givenBack(t *testing.T) {
	t.Helper()
	s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, "the VM runs on the source")
	if !s.vmRuns(t) {
		t.Error("the VM does not run")
	}
	s.noRecord(t)
}

// noRecord fails the test if a record is left.
func (s *stage) noRecord(t *testing.T) {
	t.Helper()
	if records, err := s.records.All(); err != nil || len(records) != 0 {
		t.Errorf("records that are left: %v, %v", records, err)
	}
}
