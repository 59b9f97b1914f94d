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

// errRehearsed is the reason that a destination is given when a rehearsal is over.
var errRehearsed = errors.New("the rehearsal is over")

// finishRehearsal ends a rehearsal whose destination has loaded everything: it continues the VM here and reports.
func (s *Source) finishRehearsal(ctx context.Context) {
	s.export.Revoke()
	began := time.Now()
	note, err := s.continueVM()
	s.steps.cont = time.Since(began)
	s.tellToGiveUp(ctx, errRehearsed)
	where := s.whereBeforeCommit(note)
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
		// A real hand-over crosses the network once more than a rehearsal.
		Downtime:    durationpb.New(s.steps.stop + s.steps.save + s.steps.transfer + s.steps.network + s.steps.cont),
		Differences: s.loadAnswer.GetDifferences(),
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

// saveAndCompare has the destination's QEMU save the state that it has loaded, and returns how it differs from loaded.
func (d *Destination) saveAndCompare(ctx context.Context, loaded []byte) ([]*migratedv1.DeviceDifference, error) {
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
