// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/migrated-vm/migrated/internal/devicestate"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// errRehearsed is why a destination gives up after a rehearsal.
var errRehearsed = errors.New("the rehearsal is over")

// rehearsed ends a rehearsal whose destination has loaded everything: the VM goes on here.
func (s *Source) rehearsed(ctx context.Context) {
	s.export.Withdraw()
	began := time.Now()
	note, err := s.continueVM()
	s.steps.cont = time.Since(began)
	s.tellToGiveUp(ctx, errRehearsed)
	where := s.whereNow(note)
	if err != nil {
		s.fail(migratedv1.MigrationState_MIGRATION_STATE_FAILED, fmt.Errorf("after a rehearsal: %w", err), where)
		return
	}
	result := &migratedv1.Rehearsal{
		StopTime:     durationpb.New(s.steps.stop),
		SaveTime:     durationpb.New(s.steps.save),
		TransferTime: durationpb.New(s.steps.transfer),
		LoadTime:     durationpb.New(s.steps.load),
		ContinueTime: durationpb.New(s.steps.cont),
		// The hand-over crosses the network once more than the state did.
		Downtime:    durationpb.New(s.steps.stop + s.steps.save + s.steps.transfer + s.steps.network + s.steps.cont),
		Differences: s.loaded.GetDifferences(),
	}
	for _, b := range s.blocks {
		result.BytesMemory += b.Size
	}
	s.log.Info("rehearsed", "downtime", result.GetDowntime().AsDuration(), "where", where.words)
	s.update(func(m *migratedv1.Migration) {
		result.BytesDeviceState = m.GetProgress().GetBytesDeviceState()
		m.State, m.Location, m.Rehearsal = migratedv1.MigrationState_MIGRATION_STATE_REHEARSED, where.location, result
	})
}

// saveAgain has the destination save what it has loaded, and says what became another.
func (d *Destination) saveAgain(ctx context.Context, loaded []byte) ([]*migratedv1.DeviceDifference, error) {
	saver, err := d.vm.NewSaver(ctx)
	if err != nil {
		return nil, err
	}
	again, saveErr := saver.Save(ctx, false, nil)
	if err := errors.Join(saveErr, saver.Close(ctx)); err != nil {
		return nil, err
	}
	was, wasErr := devicestate.ParseBody(loaded)
	is, isErr := devicestate.Parse(again)
	if err := errors.Join(wasErr, isErr); err != nil {
		return nil, err
	}
	var differences []*migratedv1.DeviceDifference
	for _, x := range devicestate.Compare(was, is) {
		differences = append(differences, &migratedv1.DeviceDifference{
			Device: x.Name, Instance: x.Instance, Bytes: uint64(x.Bytes),
		})
	}
	return differences, nil
}
