// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// complete lets the source's QEMU go: its memory is at the destination.
func (s *Source) complete() {
	reached("source-last-page")
	s.export.Withdraw()
	// A daemon that is started again could not tell a QEMU that quit from one that died with memory still needed.
	if err := s.cfg.Records.Complete(s.cfg.ID); err != nil {
		s.log.Warn("that all memory has left is not written down", "error", err)
	}
	reached("source-completing")
	if !s.cfg.Spec.GetKeepSource() {
		ctx, cancel := context.WithTimeout(context.Background(), quitTimeout)
		defer cancel()
		if err := s.vm.Quit(ctx); err != nil {
			s.log.Warn("the source's QEMU did not quit; it is stopped and no longer needed", "error", err)
		}
	}
	reached("source-quit")
	s.forgetRecord()
	reached("source-forgotten")
	s.setState(migratedv1.MigrationState_MIGRATION_STATE_COMPLETED)
	s.log.Info("completed")
}

func (s *Source) forgetRecord() {
	if err := s.cfg.Records.Remove(s.cfg.ID); err != nil {
		s.log.Warn("the record stays", "error", err)
	}
}

// backOut ends a migration that did not hand the VM over: the VM goes on here.
// It does not look at ctx, which may be over, except for why.
func (s *Source) backOut(ctx context.Context, reason error) {
	if s.export != nil {
		s.export.Withdraw() // no page is read from here on
	}
	vmStatus := "the VM was not touched"
	if s.stopTried {
		vmStatus = s.continueVM()
	}
	// The VM runs again, or never stopped: the rest has time.
	if s.peer != nil {
		abortCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), abortTimeout)
		defer cancel()
		_, err := s.peer.AbortIncoming(abortCtx, &migratedv1.AbortIncomingRequest{Id: s.cfg.ID, Reason: reason.Error()})
		if err != nil && status.Code(err) != codes.NotFound {
			s.log.Warn("could not tell the destination to give up; it does so by itself", "error", err)
		}
	}
	state := migratedv1.MigrationState_MIGRATION_STATE_FAILED
	if errors.Is(reason, ErrCancelled) {
		state = migratedv1.MigrationState_MIGRATION_STATE_CANCELLED
	}
	s.log.Warn("gave up", "state", state, "reason", reason, "vm", vmStatus)
	s.fail(state, reason, vmStatus)
}

// continueVM puts the VM back to what it was before it was stopped, and says
// what became of it.
func (s *Source) continueVM() (vmStatus string) {
	ctx, cancel := context.WithTimeout(context.Background(), resumeTimeout)
	defer cancel()
	reached("source-backing-out")
	if err := s.vm.CancelMigrate(ctx); err != nil {
		s.log.Warn("cancel QEMU's own migration", "error", err)
	}
	if !s.wasRunning {
		s.forgetRecord()
		return "the VM is paused on the source, as it was before"
	}
	if _, err := s.vm.Cont(ctx); err != nil {
		s.log.Error("cannot continue the VM", "error", err)
		// The record stays, for a daemon that is started again to try.
		return fmt.Sprintf("the VM is stopped on the source with its memory intact; continue it with QMP 'cont' on %s (%v)",
			s.cfg.Spec.GetVm(), err)
	}
	reached("source-continued")
	s.forgetRecord()
	return "the VM runs on the source"
}

func (s *Source) stoppedStatus() string {
	return "the VM is stopped on the source with its memory as it was at the switch"
}
