// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// errReleased is the final error of a migration that its operator ended by Release.
var errReleased = errors.New("an operator declared that the VM is at the destination with all of its memory, " +
	"or has ended there (migrated release)")

// askTimeout bounds how long a destination may take to report the state of a migration.
const askTimeout = 3 * time.Second

// Release ends a migration after the commit point, and what is left of the VM here, because the VM is at a destination
// that cannot say so. The caller has to know that the VM needs nothing of the source any more. If the destination
// answers, its answer decides instead.
func (s *Source) Release(ctx context.Context) error {
	s.declareMu.Lock()
	defer s.declareMu.Unlock()
	switch view, _ := s.Snapshot(); {
	case view.GetState() == migratedv1.MigrationState_MIGRATION_STATE_COMPLETED,
		view.GetState() == migratedv1.MigrationState_MIGRATION_STATE_ENDED:
		return errors.New("the migration is over already: nothing is left to release")
	case !s.isCommitted():
		return withRemedy(errors.New("the VM has not been handed over"), "cancel the migration")
	}
	if err := s.checkReleasable(ctx); err != nil {
		return err
	}
	if err := s.endFor(ctx, errDeclaring); err != nil {
		return err
	}
	switch view, _ := s.Snapshot(); {
	case view.GetState() == migratedv1.MigrationState_MIGRATION_STATE_COMPLETED,
		view.GetState() == migratedv1.MigrationState_MIGRATION_STATE_ENDED:
		return nil // it ended at this moment
	case !s.isCommitted():
		return errors.New("the destination has given the VM back at this moment: it is on this host")
	}
	stays, err := s.endHandedOver(ctx)
	if err != nil {
		return fmt.Errorf("end what is left of the VM here: %w", err)
	}
	s.keepDefinition(errors.New("the destination cannot say that the domain is defined there"))
	s.clearCommit()
	words := "its QEMU on the source was kept, and does not run"
	if !stays {
		s.removeRecord()
		words = "its QEMU on the source has ended"
	}
	s.log.Warn("released: the operator said that the VM is at the destination", "source_qemu_stays", stays)
	s.fail(migratedv1.MigrationState_MIGRATION_STATE_FAILED, errReleased, whereabouts{
		migratedv1.Location_LOCATION_DESTINATION, "the VM is on the destination, as its operator said; " + words,
	})
	return nil
}

// endFor stops what this daemon does for the migration, because of cause. It returns when no more pages are served and
// Run is not repeated, or when ctx ends.
func (s *Source) endFor(ctx context.Context, cause error) error {
	s.cancel(cause)
	select {
	case <-s.done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// checkReleasable fails if the destination answers and still needs the source.
func (s *Source) checkReleasable(ctx context.Context) error {
	destination := s.cfg.Spec.GetDestination()
	answer, err := s.askDestination(ctx)
	if answer == nil || err != nil {
		return err
	}
	switch state, location := answer.GetState(), answer.GetLocation(); {
	case state == migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, location == migratedv1.Location_LOCATION_ENDED:
		return nil
	case Terminal(state) && location != migratedv1.Location_LOCATION_DESTINATION:
		return withRemedy(fmt.Errorf("destination %s answers that it has not got the VM: %s",
			destination, answer.GetError().GetMessage()),
			"look there with 'migrated status "+s.cfg.ID+"'; only if the VM certainly runs nowhere: "+s.fallBackCommand())
	default:
		return withRemedy(
			fmt.Errorf("destination %s answers, and the VM there still needs memory that only this host has",
				destination),
			"wait for the migration to complete; where it does not, look there with 'migrated status "+s.cfg.ID+"'")
	}
}

// askDestination asks the destination how the migration is there. It waits up to askTimeout for the migration's end,
// because the destination may be about to notice that its QEMU has ended. The answer is nil if the destination does not
// answer, or does not know the migration: then only the operator can know.
func (s *Source) askDestination(ctx context.Context) (answer *migratedv1.WatchIncomingResponse, err error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	destination := s.cfg.Spec.GetDestination()
	conn, err := s.cfg.Dial(destination, withToken(s.cfg.ID, s.token))
	if err != nil {
		return nil, fmt.Errorf("ask destination %s: %w", destination, err)
	}
	defer conn.Close()
	stream, err := migratedv1.NewPeerServiceClient(conn).WatchIncoming(ctx, &migratedv1.WatchIncomingRequest{Id: s.cfg.ID})
	for err == nil && !Terminal(answer.GetState()) {
		var next *migratedv1.WatchIncomingResponse
		if next, err = stream.Recv(); err == nil {
			answer = next
		}
	}
	switch code := status.Code(err); {
	case answer != nil:
		return answer, nil
	case code == codes.Unavailable, code == codes.DeadlineExceeded, code == codes.NotFound:
		s.log.Warn("the destination cannot say how the migration is there", "error", err)
		return nil, nil
	default:
		return nil, fromPeer("ask how the migration is there", destination, err)
	}
}

// endHandedOver ends the QEMU of the record, which is stopped, and removes the files of its memory. If it has ended
// already, endHandedOver does nothing. stays: the operator wants to keep that QEMU. It is left alone then, and its
// record, which is completed, keeps it from being taken for the VM.
func (s *Source) endHandedOver(ctx context.Context) (stays bool, err error) {
	rec, found, err := s.cfg.Records.find(s.cfg.ID)
	if err != nil || !found || !rec.Alive() {
		return false, err
	}
	vm, err := s.attachHandedOver(ctx)
	if err != nil {
		return false, err
	}
	stays = s.cfg.Spec.GetKeepSource()
	switch err = vm.VerifyStopped(ctx); {
	case err != nil:
	case stays:
		err = s.cfg.Records.Complete(s.cfg.ID, migratedv1.Reason_REASON_UNSPECIFIED, nil)
	default:
		files := s.ramFilesOf(vm)
		if err = s.quitQEMU(ctx, vm); err == nil {
			s.removeRAMFiles(files)
		}
	}
	return stays, errors.Join(err, vm.Close())
}

// releaseCommand returns the command line for Release.
func (s *Source) releaseCommand() string { return releaseCommand(s.cfg.ID) }

func releaseCommand(id string) string { return "migrated release " + id + " --vm-is-at-destination" }

// leaveToNextDaemon leaves the migration to the next daemon, because this one ends. That is no failure. The record says
// how far the migration is, and where is where its VM is now.
func (s *Source) leaveToNextDaemon(err error, where whereabouts) {
	s.log.Warn("the next start of this daemon goes on with it", "reason", err)
	testPoint("source-leaving")
	s.update(func(m *migratedv1.Migration) {
		m.Location = where.location
		m.Error = Describe(withRemedy(withReason(err, migratedv1.Reason_REASON_DAEMON_ENDED),
			"start the source's daemon again: it goes on with the migration"))
		m.Error.VmStatus = where.words
	})
}
