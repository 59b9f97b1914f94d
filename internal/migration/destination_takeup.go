// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/migrated-vm/migrated/internal/libvirt"
	"github.com/migrated-vm/migrated/pkg/uffd/inject"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// KeptDirs returns the directories below dir in which an earlier run of the daemon left a migration to this host that
// had not ended.
func KeptDirs(dir string) ([]string, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*", keptFacts))
	for i := range files {
		files[i] = filepath.Dir(files[i])
	}
	return files, err
}

// RemoveDir removes the directory of an ended migration to this host, with its logs. It keeps a directory that a
// restarted daemon has to take up.
func RemoveDir(dir string) error {
	if _, err := os.Lstat(filepath.Join(dir, keptFacts)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.RemoveAll(dir)
}

// RemoveEnded calls RemoveDir for all directories below dir. Nobody asks about those migrations any more, and each
// attempt of a peer leaves one.
func RemoveEnded(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	errs := []error{err}
	for _, e := range entries {
		errs = append(errs, RemoveDir(filepath.Join(dir, e.Name())))
	}
	return errors.Join(errs...)
}

// TakeUpDestination goes on with the migration that an earlier run of this daemon left in cfg.Dir; cfg has no
// Request. QEMU kept its copy of the userfaultfd open: threads that need a missing page have waited since. A VM that
// was not told to run goes on at the source, unless the source still sends Run.
func TakeUpDestination(ctx context.Context, cfg DestinationConfig) (*Destination, error) {
	k, facts, request, err := takeUpKept(cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("take up the migration kept in %s: %w", cfg.Dir, err)
	}
	cfg.Request = request
	d := NewDestination(ctx, cfg)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.takeUpState(k)
	d.facts, d.left = facts, facts.QEMU
	d.noteTakenUp(d.step() == ended || d.step() == filled)
	if libvirt.IsAddress(facts.QMP) {
		d.domain = facts.QMP
	}
	d.takeUpShown(facts)
	if since := k.header().resumed.Load(); since != 0 {
		d.meter.switched(time.Unix(0, since), time.Duration(k.header().downtime.Load()))
	}
	testPoint("destination-taken-up")
	switch d.step() { // both are over; the source may still ask how they ended
	case ended:
		d.showEnded(endingForReason(migratedv1.Reason(k.header().ended.Load())))
		d.finish()
		return d, nil
	case filled:
		d.log.Info("taking up a migration of which all memory is here")
		d.takeUpFilled(facts)
		return d, nil
	}
	d.log.Warn("taking up a migration that an earlier run of this daemon left", "switched", d.toldToRun())
	if err := d.takeUp(facts); err != nil {
		d.notTakenUp(facts, err)
		return d, nil
	}
	switch {
	case !d.toldToRun():
		d.expire(loadedTimeout, "the source did not tell the destination to run the VM")
	case d.runAnswer() != nil: // else Run has to tell QEMU again, and the migration must not end before that
		d.engine.StartSweep()
	}
	d.supervision, d.label = facts.Supervision, facts.Label
	d.update(func(m *migratedv1.Migration) {
		m.Supervision, m.UserfaultfdLabel = shownSupervision[d.supervision], d.label
		m.State = migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_RECOVER
		m.Prepared = true
		m.Progress = d.meter.progress(d.engine.Stats())
	})
	if due := k.header().due.Load(); due != 0 {
		d.watchDeadline(time.Unix(0, due))
	}
	d.pumpStarted = true
	d.attaching = make(chan struct{})
	go d.pump(nil)
	go d.attachTakenUp(facts)
	return d, nil
}

// takeUpShown shows times and the QEMU process from the files. The caller holds mu.
func (d *Destination) takeUpShown(facts *keptFactsV1) {
	h := d.kept.header()
	at := func(nanoseconds int64) *timestamppb.Timestamp {
		if nanoseconds == 0 {
			return nil
		}
		return timestamppb.New(time.Unix(0, nanoseconds))
	}
	d.update(func(m *migratedv1.Migration) {
		if !facts.Created.IsZero() {
			m.CreateTime = timestamppb.New(facts.Created)
		}
		m.StartTime, m.SwitchTime, m.EndTime = at(h.started.Load()), at(h.resumed.Load()), at(h.over.Load())
		m.DestinationQemu = d.shownQEMU(facts.QEMU.PID)
	})
}

// takeUp makes pages flow again. It asks QEMU nothing: QEMU's main loop may wait for a page.
func (d *Destination) takeUp(facts *keptFactsV1) (err error) {
	if !facts.QEMU.Alive() {
		return errQEMUGone
	}
	if err := qemuClaims.claim(facts.QEMU, d.cfg.Request.GetId()); err != nil {
		return err
	}
	d.claim = facts.QEMU
	if d.exit, err = facts.QEMU.Exit(); err != nil {
		return err
	}
	if d.step() == preparing {
		return errors.New("the device state had not arrived")
	}
	if d.taken, err = inject.Duplicate(facts.QEMU.PID, facts.RemoteFD); err != nil {
		return fmt.Errorf("take the userfaultfd from the destination QEMU again: %w", err)
	}
	return d.makeEngine(facts)
}

// takeUpFilled ends a migration whose memory is all here. The caller holds mu.
func (d *Destination) takeUpFilled(facts *keptFactsV1) {
	progress := &migratedv1.Progress{Downtime: durationpb.New(time.Duration(d.kept.header().downtime.Load()))}
	for _, b := range facts.Blocks {
		progress.BytesTotal += b.Size
		progress.PagesTotal += b.Size / b.PageSize
	}
	progress.PagesPresent = progress.GetPagesTotal()
	d.defined.Store(d.kept.header().defined.Load() != 0)
	state := migratedv1.MigrationState_MIGRATION_STATE_COMPLETED
	if d.mustPersist() { // the earlier run ended before it did
		state = migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_ACTIVE
	}
	d.update(func(m *migratedv1.Migration) {
		m.State, m.Prepared, m.Progress = state, true, progress
		m.Location = migratedv1.Location_LOCATION_DESTINATION
	})
	closed := d.kept.header().closed.Load() != 0
	if closed && !d.mustPersist() {
		d.finish()
		return
	}
	go func() { // libvirt may hang, and so may QEMU: other VMs wait for this daemon
		defer d.finishAlone()
		if d.mustPersist() {
			d.persist()
			d.setState(migratedv1.MigrationState_MIGRATION_STATE_COMPLETED)
		}
		if !closed {
			d.leaveQEMU(facts)
		}
	}()
}

// leaveQEMU has QEMU forget what the migration has left in it. All memory is here.
func (d *Destination) leaveQEMU(facts *keptFactsV1) {
	vm, err := attachKept(d.ctx, facts)
	if err != nil { // the VM may have ended since; if not, putBackLater goes on
		d.log.Warn("QEMU's settings are not put back yet", "error", err)
		return
	}
	d.closeRemote(facts.QEMU.PID, facts.RemoteFD)
	vm.PutBack(facts.Settings)
	d.mu.Lock()
	d.vm = vm
	d.mu.Unlock()
}

// attachTakenUp connects to QEMU's monitor as soon as QEMU answers.
func (d *Destination) attachTakenUp(facts *keptFactsV1) {
	defer close(d.attaching)
	for {
		vm, err := attachKept(d.ctx, facts)
		if err == nil {
			d.noteQEMU(vm.QMP.Version())
			vm.PutBack(facts.Settings)
			d.mu.Lock()
			d.vm = vm
			d.mu.Unlock()
			go d.watchQEMU(vm)
			if d.toldToRun() { // else Run follows it, if the VM stays paused
				go d.findContinued(vm)
			}
			return
		}
		if !facts.QEMU.Alive() {
			d.cancel(errQEMUGone)
			return
		}
		d.log.Warn("the destination QEMU does not answer yet", "error", err)
		if sleep(d.ctx, time.Second) != nil {
			return
		}
	}
}

// awaitAttached returns when attachTakenUp has ended. If all memory is here, QEMU answers unless another client holds
// its monitor. After a failure QEMU may never answer, so the wait is cut short.
func (d *Destination) awaitAttached(failure error) {
	if d.attaching == nil {
		return
	}
	if failure == nil {
		select {
		case <-d.attaching:
			return
		case <-time.After(closeTimeout):
			failure = errors.New("QEMU's monitor does not answer")
		}
	}
	d.cancel(failure)
	<-d.attaching
}

// errQEMUGone is why a migration cannot be taken up: its QEMU has ended.
var errQEMUGone = errors.New("the destination QEMU has ended")

// notTakenUp ends a migration that cannot go on. The caller holds mu.
func (d *Destination) notTakenUp(facts *keptFactsV1, err error) {
	err = fmt.Errorf("%w (%w)", err, errDaemonEnded)
	if !d.toldToRun() {
		d.giveUp(err)
		return
	}
	// The files stay as long as QEMU lives: the cause may be gone when the daemon starts next.
	remedy := "remove the cause, then restart the destination's daemon: it goes on with the migration; " +
		"until then, threads that need a missing page wait"
	if !facts.QEMU.Alive() {
		d.moveTo(lost)
		remedy = fmt.Sprintf("run 'migrated status %s' on the source: it says whether the VM can be continued there",
			d.cfg.Request.GetId())
	}
	d.log.Error("cannot take up the migration", "error", err)
	d.fail(migratedv1.MigrationState_MIGRATION_STATE_FAILED,
		withRemedy(err, remedy),
		d.whereFailed())
	d.cancel(err)
	d.finish()
}
