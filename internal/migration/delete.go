// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"
	"time"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// Delete forgets a migration that is over before the daemon does so by itself. It keeps what still protects a VM: it
// refuses while
//
//   - the migration is under way, or still holds resources;
//   - it is not decided where the VM is: FallBack, Release or Abandon decide it;
//   - the source has a record of a QEMU that is alive: the record keeps that QEMU from being continued, and from being
//     taken for the VM;
//   - the source may still ask the destination how the migration ended, and without the answer would not know what
//     became of its VM: it was not told that the migration is over, it has not given up itself, and it still offers
//     the VM's memory or cannot be asked;
//   - settings of the destination's QEMU have to be restored.

// errNotOver says that a migration cannot be deleted yet.
var errNotOver = withRemedy(errors.New("the migration is not over"), "wait for its end, or cancel it at its source")

// Delete removes what this host keeps of the migration, because it is not needed any more. It returns an error with a
// remedy if it still is.
func (s *Source) Delete(context.Context) error {
	view, _ := s.Snapshot()
	if !Terminal(view.GetState()) || !isClosed(s.done) {
		return errNotOver
	}
	if err := s.Needed(); err != nil {
		return err
	}
	rec, found, err := s.cfg.Records.find(s.cfg.ID)
	switch {
	case err != nil:
		return withRemedy(fmt.Errorf("read the VM's hand-over record: %w", err), Remedy(err))
	case found && rec.Alive() && rec.Completed:
		return withRemedy(fmt.Errorf("the QEMU that the VM was moved from, process %d, was kept, "+
			"and only this record keeps it from being taken for the VM", rec.PID), "end that QEMU (QMP quit) first")
	case found && rec.Alive():
		return withRemedy(fmt.Errorf("the VM (process %d) could not be restored after the migration; "+
			"a restarted daemon needs this record to try again", rec.PID),
			"see 'migrated status "+s.cfg.ID+"', then start the daemon again")
	case found:
		if err := s.cfg.Records.Remove(s.cfg.ID); err != nil {
			return err
		}
	}
	s.setDeleted()
	return nil
}

// Needed returns why a migration that is over must not be forgotten, by Delete or to make room for another: what this
// host knows of it still decides where its VM is. nil: it may be forgotten. Needed asks no other host.
func (s *Source) Needed() error {
	if view, _ := s.Snapshot(); s.isCommitted() && view.GetState() == migratedv1.MigrationState_MIGRATION_STATE_FAILED {
		return withRemedy(errors.New("the VM was handed over, and it is not decided where it is"),
			remedyUndecided(s.cfg.ID))
	}
	return nil
}

// Delete is the same for the destination. It may ask the source.
func (d *Destination) Delete(ctx context.Context) error {
	view, _ := d.Snapshot()
	if !Terminal(view.GetState()) || !isClosed(d.done) {
		return errNotOver
	}
	d.AskSource(ctx)
	if err := d.Needed(); err != nil {
		return err
	}
	d.mu.Lock()
	owes := d.mustPutBackSettings()
	d.mu.Unlock()
	if owes {
		return withRemedy(errors.New("QEMU's settings could not be restored yet"),
			"disconnect the other client of "+view.GetDestinationQemu().GetQmp())
	}
	d.Forget()
	if err := RemoveDir(d.cfg.Dir); err != nil {
		return fmt.Errorf("remove what was kept of the migration: %w", err)
	}
	d.setDeleted()
	return nil
}

// Needed is the same for the destination.
func (d *Destination) Needed() error {
	view, _ := d.Snapshot()
	failed := view.GetState() == migratedv1.MigrationState_MIGRATION_STATE_FAILED
	switch {
	case failed && (d.step() == running || d.step() == lost):
		return withRemedy(errors.New("the VM was run here, and does not have all of its memory"),
			"see 'migrated status "+d.cfg.Request.GetId()+"'; if you give the VM up: "+d.abandonCommand())
	case d.unheard(view):
		return withRemedy(errors.New("the source does not know yet that the migration is over, "+
			"and would not learn what became of its VM"),
			"see that the source's daemon runs and reaches this host, then try again")
	}
	return nil
}

// unheard says whether the source of a migration that is over may still ask how it ended, as far as is known here.
func (d *Destination) unheard(view *migratedv1.Migration) bool {
	return view.GetStartTime() != nil && !d.heard.Load() &&
		view.GetError().GetReason() != migratedv1.Reason_REASON_ABANDONED
}

// AskSource asks a source that has not heard how the migration ended whether it needs to hear, before another migration
// gets the id, or this one is deleted.
func (d *Destination) AskSource(ctx context.Context) {
	view, _ := d.Snapshot()
	if isClosed(d.done) && d.unheard(view) && d.sourceLetGo(ctx, view) {
		d.Heard()
	}
}

// Heard notes that the source was told how the migration ended, has ended it itself, or needs nothing of this host any
// more.
func (d *Destination) Heard() { d.heard.Store(true) }

// sourceLetGo reports whether the source needs nothing from this host any more: it answers, and no longer offers the
// VM's memory. A source that cannot be asked counts as one that does after retentionTime, but only if an earlier run of
// this daemon saw the end of the migration: the source may have been told then.
func (d *Destination) sourceLetGo(ctx context.Context, view *migratedv1.Migration) bool {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	l, err := openLanes(ctx, d.laneConfig())
	if err == nil {
		l.close()
		return false
	}
	return reasonOf(err) == migratedv1.Reason_REASON_PAGES_REFUSED ||
		d.WasOver() && time.Since(view.GetUpdateTime().AsTime()) > retentionTime
}

// Delete refuses: a file that cannot be read may be about a VM.
func (l *Leftover) Delete(context.Context) error {
	view, _ := l.Snapshot()
	return withRemedy(fmt.Errorf("what an earlier run of this daemon left of it cannot be read: %s",
		view.GetError().GetMessage()), view.GetError().GetRemedy())
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
