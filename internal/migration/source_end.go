// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// complete ends the source's QEMU, whose memory is all at the destination.
func (s *Source) complete() {
	testPoint("source-last-page")
	s.endSourceVM(migratedv1.Reason_REASON_UNSPECIFIED, s.showCompleted)
	s.log.Info("completed")
}

// showCompleted shows the migration as completed.
func (s *Source) showCompleted() {
	s.update(func(m *migratedv1.Migration) {
		m.State = migratedv1.MigrationState_MIGRATION_STATE_COMPLETED
		m.Location = migratedv1.Location_LOCATION_DESTINATION
	})
}

// reportAndForget stores the report of a migration that is shown as over, and then removes its record. A restarted
// daemon finds at least one of the two, and so knows where the VM is.
func (s *Source) reportAndForget() {
	s.report()
	s.removeRecord()
	testPoint("source-forgotten")
}

// report stores the report of a migration that is shown as over.
func (s *Source) report() {
	if s.cfg.Report != nil {
		s.cfg.Report(s)
	}
	testPoint("source-reported")
}

// removeRecord removes the record, and logs a failure.
func (s *Source) removeRecord() {
	if err := s.cfg.Records.Remove(s.cfg.ID); err != nil {
		s.log.Warn("cannot remove the migration's record", "error", err)
	}
}

// backOut ends a migration that did not hand the VM over: the VM goes on here. ctx may have ended; backOut uses only
// its values.
func (s *Source) backOut(ctx context.Context, reason error) {
	if s.export != nil {
		s.export.Revoke() // no page is sent from here on
	}
	note := ""
	switch {
	case s.qemuEnded():
		s.removeRecord()
	case s.stopTried():
		note, _ = s.continueVM()
	}
	s.undoKeepMemory()
	s.noteSteps(&migratedv1.DowntimeSteps{})
	s.tellToGiveUp(ctx, reason) // not urgent: the VM runs again, or never stopped
	state := migratedv1.MigrationState_MIGRATION_STATE_FAILED
	if errors.Is(reason, ErrCancelled) {
		state = migratedv1.MigrationState_MIGRATION_STATE_CANCELLED
	}
	where := s.whereBeforeCommit(note)
	s.log.Warn("gave up", "state", state, "reason", reason, "where", where.words)
	s.fail(state, reason, where)
}

// tellToGiveUp tells the destination to end its QEMU. If the message does not arrive, the destination does so by
// itself.
func (s *Source) tellToGiveUp(ctx context.Context, reason error) {
	if s.peer == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), abortTimeout)
	defer cancel()
	_, err := s.peer.AbortIncoming(ctx, &migratedv1.AbortIncomingRequest{Id: s.cfg.ID, Reason: reason.Error()})
	if err != nil && status.Code(err) != codes.NotFound {
		s.log.Warn("could not tell the destination to give up; it does so by itself", "error", err)
	}
}

// release frees everything that the source holds. It does not touch the VM itself.
func (s *Source) release() {
	s.earlyState.close()
	s.closeContLock()
	qemuClaims.unclaim(s.claim)
	if s.export != nil {
		s.export.Withdraw()
	}
	if s.ram != nil {
		if err := s.ram.Close(); err != nil {
			s.log.Warn("close the RAM", "error", err)
		}
		s.ram = nil
	}
	s.lastIncoming.conn.Store(nil)
	if s.conn != nil {
		if err := s.conn.Close(); err != nil {
			s.log.Warn("close the connection to the destination", "error", err)
		}
	}
	s.closeReconnected()
	if s.vm != nil {
		if err := s.vm.Close(); err != nil {
			s.log.Warn("cannot disconnect from QEMU", "error", err)
		}
	}
}
