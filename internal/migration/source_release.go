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

// errReleased is why a migration ended whose destination could not say how.
var errReleased = errors.New("its operator declared that the VM is at the destination with all of its memory, or ended there")

// askTimeout is how long a destination may take to say how a migration stands.
const askTimeout = 5 * time.Second

// Release ends a migration past the commit point, and what is left of the VM here, because the VM is at the destination,
// which cannot say so. The caller knows that it needs nothing of the source any more; a destination that answers knows
// better.
func (s *Source) Release(ctx context.Context) error {
	s.commitMu.Lock()
	committed := s.committed
	s.commitMu.Unlock()
	switch view, _ := s.Snapshot(); {
	case view.GetState() == migratedv1.MigrationState_MIGRATION_STATE_COMPLETED,
		view.GetState() == migratedv1.MigrationState_MIGRATION_STATE_ENDED:
		return errors.New("the source has let go of the VM already")
	case !committed:
		return withRemedy(errors.New("the VM has not been handed over"), "cancel the migration")
	}
	if err := s.maySay(ctx); err != nil {
		return err
	}
	s.cancel(errReleased)
	select { // its pages are not served from here on, and nobody repeats Run
	case <-s.done:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if view, _ := s.Snapshot(); view.GetState() == migratedv1.MigrationState_MIGRATION_STATE_COMPLETED {
		return nil // at this moment
	}
	if err := s.endHandedOver(ctx); err != nil {
		return fmt.Errorf("end what is left of the VM here: %w", err)
	}
	s.giveBack()
	s.forgetRecord()
	s.log.Warn("released: the VM is at the destination, its operator says")
	s.fail(migratedv1.MigrationState_MIGRATION_STATE_FAILED, errReleased, whereabouts{
		migratedv1.Location_LOCATION_DESTINATION, "the VM is on the destination, as its operator said; nothing of it is left on the source",
	})
	return nil
}

// maySay asks the destination, where it answers, whether it needs the source yet.
func (s *Source) maySay(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	destination := s.cfg.Spec.GetDestination()
	conn, err := s.cfg.Dial(destination, withToken(s.cfg.ID, s.token))
	if err != nil {
		return fmt.Errorf("ask destination %s: %w", destination, err)
	}
	defer conn.Close()
	stream, err := migratedv1.NewPeerServiceClient(conn).WatchIncoming(ctx, &migratedv1.WatchIncomingRequest{Id: s.cfg.ID})
	var answer *migratedv1.WatchIncomingResponse
	if err == nil {
		answer, err = stream.Recv()
	}
	switch code := status.Code(err); {
	case code == codes.Unavailable, code == codes.DeadlineExceeded, code == codes.NotFound:
		s.log.Warn("the destination cannot say whether it needs the source yet", "error", err)
		return nil
	case err != nil:
		return fromPeer("ask whether it needs the source yet", destination, err)
	}
	switch state, location := answer.GetState(), answer.GetLocation(); {
	case state == migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, location == migratedv1.Location_LOCATION_ENDED:
		return nil
	case Terminal(state) && location != migratedv1.Location_LOCATION_DESTINATION:
		return withRemedy(fmt.Errorf("destination %s answers that it has not got the VM: %s", destination, answer.GetError().GetMessage()),
			"look there with 'migrated status "+s.cfg.ID+"'; only if the VM certainly runs nowhere: "+s.fallBackCommand())
	default:
		return withRemedy(fmt.Errorf("destination %s answers, and needs memory of the VM that is here alone", destination),
			"wait for the migration to complete; where it does not, look there with 'migrated status "+s.cfg.ID+"'")
	}
}

// endHandedOver ends the QEMU of the record, which stands still, unless that has ended.
func (s *Source) endHandedOver(ctx context.Context) error {
	if rec, found, err := s.cfg.Records.of(s.cfg.ID); err != nil || !found || !rec.Alive() || s.cfg.Spec.GetKeepSource() {
		return err
	}
	vm, err := s.attachHandedOver(ctx)
	if err != nil {
		return err
	}
	if err = vm.VerifyStopped(ctx); err == nil {
		err = vm.Quit(ctx)
	}
	return errors.Join(err, vm.Close())
}

func (s *Source) releaseCommand() string {
	return "migrated release " + s.cfg.ID + " --vm-is-at-destination"
}

// handedOn says that this daemon ends in the middle, after the commit point: that is no failure. The next one goes on.
func (s *Source) handedOn(err error) {
	s.unwatch()
	s.log.Warn("left for the next start of this daemon", "reason", err)
	reached("source-leaving")
	where := s.whereHandedOver()
	s.update(func(m *migratedv1.Migration) {
		m.Location = where.location
		m.Error = describe(withRemedy(withReason(err, migratedv1.Reason_REASON_DAEMON_ENDED),
			"start the source's daemon again: it goes on with the migration"))
		m.Error.VmStatus = where.words
	})
}
